"""Many runs over one session."""
