"""Processes: started, called, watched and ended."""
