// The live half of the tensor map: draws the tile it has, asks for the one it needs. No dependency, no build step.
// Everything that comes from a model or a tensor is put into the page as a text node.

const STYLE = `
.fk-map { --fk-ink: var(--jp-ui-font-color1, var(--vscode-editor-foreground, CanvasText));
  --fk-soft: var(--jp-ui-font-color2, var(--vscode-descriptionForeground, GrayText));
  --fk-line: var(--jp-border-color2, var(--vscode-panel-border, #8884));
  --fk-paper: var(--jp-layout-color1, var(--vscode-editor-background, Canvas));
  --fk-accent: var(--jp-brand-color1, var(--vscode-focusBorder, #1976d2));
  color: var(--fk-ink); font: 12px/1.4 var(--jp-ui-font-family, system-ui, sans-serif); margin: 4px 0; max-width: 1100px; }
.fk-map * { box-sizing: border-box; }
.fk-head { display: flex; flex-wrap: wrap; gap: 2px 10px; align-items: baseline; margin-bottom: 6px; }
.fk-title { font-weight: 600; font-size: 13px; }
.fk-soft { color: var(--fk-soft); }
.fk-tag { border: 1px solid var(--fk-line); border-radius: 9px; padding: 0 7px; color: var(--fk-soft); font-size: 11px; }
.fk-tools { margin-left: auto; display: flex; gap: 4px; }
.fk-tools :is(button, select) { font: inherit; font-size: 11px; color: var(--fk-ink); background: var(--fk-paper);
  border: 1px solid var(--fk-line); border-radius: 4px; padding: 1px 7px; height: 22px; cursor: pointer; }
.fk-tools :is(button, select):hover { border-color: var(--fk-accent); }
.fk-tools button[aria-pressed=true] { border-color: var(--fk-accent); color: var(--fk-accent); }
.fk-body { display: grid; grid-template-columns: auto minmax(0, 1fr) auto 74px; }
.fk-rows, .fk-cols, .fk-bar { position: relative; font-size: 11px; font-variant-numeric: tabular-nums; }
.fk-rows bdi { position: absolute; right: 7px; max-width: calc(100% - 7px); transform: translateY(-50%);
  overflow: hidden; text-overflow: ellipsis; white-space: pre; line-height: 14px; }
.fk-cols { grid-column: 2; height: 20px; }
.fk-cols bdi { position: absolute; top: 4px; transform: translateX(-50%); white-space: nowrap; }
.fk-cols i { position: absolute; top: 0; width: 1px; height: 4px; background: var(--fk-soft); }
.fk-rows i { position: absolute; right: 0; height: 1px; width: 4px; background: var(--fk-soft); }
.fk-plot { position: relative; overflow: hidden; border: 1px solid var(--fk-line); border-radius: 2px; touch-action: none; }
.fk-plot canvas { display: block; width: 100%; height: 100%; cursor: crosshair; outline: none; }
.fk-plot:focus-within { border-color: var(--fk-accent); }
.fk-mark, .fk-box, .fk-cut { position: absolute; pointer-events: none; }
.fk-mark { outline: 1.5px solid #000; box-shadow: 0 0 0 2.5px #fff; min-width: 3px; min-height: 3px; }
.fk-box { border: 1px dashed #000; outline: 1px solid #fffa; background: #1976d222; }
.fk-cut { border: 0 dashed #333c; }
.fk-strip { position: relative; font-size: 10px; }
.fk-strip.fk-top { grid-column: 2; height: 17px; margin-bottom: 2px; }
.fk-strip.fk-side { width: 17px; margin-left: 2px; }
.fk-strip span { position: absolute; overflow: hidden; text-align: center; white-space: nowrap; line-height: 17px;
  background: color-mix(in srgb, var(--fk-accent) 14%, var(--fk-paper)); }
.fk-strip span:nth-child(even) { background: color-mix(in srgb, var(--fk-accent) 30%, var(--fk-paper)); }
.fk-side span { width: 17px; writing-mode: vertical-rl; }
.fk-bar { margin-left: 12px; }
.fk-bar canvas { position: absolute; left: 0; top: 0; width: 12px; height: 100%; border: 1px solid var(--fk-line); border-radius: 2px; }
.fk-bar bdi { position: absolute; left: 18px; white-space: nowrap; line-height: 12px; }
.fk-foot { margin-top: 2px; display: flex; flex-wrap: wrap; gap: 0 14px; min-height: 34px; }
.fk-says { color: var(--fk-soft); }
.fk-busy { color: var(--jp-warn-color1, #b26a00); }
.fk-read { flex-basis: 100%; font-variant-numeric: tabular-nums; white-space: pre-wrap; overflow-wrap: anywhere; }
`;

const KEYS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
const HELP = "Wheel or + − zooms, drag pans, shift-drag zooms to a box, arrows move the cursor, shift-arrows pan, Home resets";

const make = (tag, name, parent, text) => {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.append(String(text)); // append of a string makes a text node
  parent?.append(node);
  return node;
};
const bytes = (b) => (b instanceof ArrayBuffer ? new Uint8Array(b) : new Uint8Array(b.buffer, b.byteOffset, b.byteLength));
const clamp = (x, lo, hi) => Math.max(lo, Math.min(hi, x));
const show = (x) => (x === 0 ? "0" : Number(x.toPrecision(3)).toString());

function render({ model, el }) {
  const info = model.get("info");
  if (!info.size) return;
  const [R, C] = info.size;
  const luts = palettes(bytes(model.get("lut")));
  const me = Math.random().toString(36).slice(2); // one map may be displayed twice: answers say whose they are
  const ui = build(el, info);
  const whole = { r0: 0, r1: R, c0: 0, c1: C };
  let view = { r0: info.open[0][0], r1: info.open[0][1], c0: info.open[1][0], c1: info.open[1][1] };
  let how = "extreme", range = null; // null: the whole map's range; "view": fit once; [lo, hi]: kept from then on
  let tile = null, overview = null; // the overview lies beneath: zooming out never shows nothing
  let cursor = null, drag = null, seq = 0, flying = 0, asked = 0, next = null, question = null, tiles = 0;
  let timer = 0, rest = 0, busy = 0, wheeled = -1e9;

  // --- asking: one question in flight, the latest wins

  const want = (delay = 0) => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      const scale = devicePixelRatio || 1, { width, height } = box();
      if (!width || !height) return;
      const fit = Math.min(1, Math.sqrt(info.pixels / (width * height * scale * scale)));
      next = {
        kind: "view", how, range,
        rows: [Math.floor(view.r0 + 1e-6), Math.ceil(view.r1 - 1e-6)], cols: [Math.floor(view.c0 + 1e-6), Math.ceil(view.c1 - 1e-6)],
        size: [Math.max(1, Math.floor(height * scale * fit)), Math.max(1, Math.floor(width * scale * fit))],
        ticks: [Math.max(1, Math.floor(height / 16)), Math.max(1, Math.floor(width / 76))],
      };
      pump();
    }, delay);
  };
  const pump = () => {
    if (flying && performance.now() - asked < 10000) return;
    const message = next ?? question;
    if (!message) return;
    if (message === next) next = null;
    else question = null;
    flying = ++seq;
    asked = performance.now();
    model.send({ ...message, view: me, seq });
    clearTimeout(busy);
    busy = setTimeout(() => waiting("kernel busy: the picture follows when it answers"), 300);
  };
  const waiting = (text) => {
    ui.busy.textContent = text;
    busy = setTimeout(() => waiting("the kernel does not answer"), 10000);
  };
  const landed = (m, buffers) => {
    if (m.kind === "frozen") return end(m.text);
    if (m.view !== me || m.seq !== flying) return;
    flying = 0;
    clearTimeout(busy);
    ui.busy.textContent = "";
    if (m.kind === "tile") accept(m, buffers, performance.now() - asked);
    else if (m.kind === "value") ui.read.textContent = m.text;
    else if (m.kind === "error") ui.busy.textContent = m.text;
    pump();
  };
  const end = (text) => {
    clearTimeout(busy);
    flying = Infinity;
    ui.busy.textContent = text;
    ui.tools.remove();
  };

  // --- drawing

  const accept = (m, buffers, wait) => {
    const [h, w] = m.size, index = bytes(buffers[0]);
    const sheet = new OffscreenCanvas(w, h), pen = sheet.getContext("2d"), image = pen.createImageData(w, h);
    const lut = luts[m.signed ? 0 : 1], pixels = new Uint32Array(image.data.buffer);
    for (let i = 0; i < pixels.length; i++) pixels[i] = lut[index[i]];
    pen.putImageData(image, 0, 0);
    const raw = buffers[1] && bytes(buffers[1]);
    const values = raw && new Float32Array(raw.slice().buffer); // slice: fp32 needs an aligned start
    tile = { ...m, sheet, index, values };
    const all = m.rows[0] === 0 && m.rows[1] === R && m.cols[0] === 0 && m.cols[1] === C;
    if (all || (overview && (overview.how !== m.how || String(overview.range) !== String(m.range)))) overview = all ? tile : null;
    if (range === "view") range = m.range;
    paint();
    ui.legend(m, lut);
    ui.says.textContent = m.says;
    if (cursor) look(...cursor); // the same place says something else at another zoom
    Object.assign(ui.plot.dataset, { tiles: ++tiles, ms: m.ms, wait: wait.toFixed(1) });
  };
  const box = () => ({ width: ui.plot.clientWidth, height: ui.plot.clientHeight });
  const x = (col) => ((col - view.c0) / (view.c1 - view.c0)) * 100;
  const y = (row) => ((row - view.r0) / (view.r1 - view.r0)) * 100;
  const paint = () => {
    const { width, height } = box(), scale = devicePixelRatio || 1, { canvas } = ui;
    const [W, H] = [Math.round(width * scale), Math.round(height * scale)];
    if (canvas.width !== W || canvas.height !== H) Object.assign(canvas, { width: W, height: H });
    const pen = canvas.getContext("2d");
    pen.clearRect(0, 0, W, H);
    pen.imageSmoothingEnabled = false;
    for (const t of new Set([overview, tile])) {
      if (!t) continue;
      const [h, w] = t.size, [bh, bw] = t.cells;
      const left = (x(t.cols[0]) / 100) * W, top = (y(t.rows[0]) / 100) * H;
      pen.drawImage(t.sheet, left, top, ((w * bw) / (view.c1 - view.c0)) * W, ((h * bh) / (view.r1 - view.r0)) * H);
    }
    if (tile) {
      axis(ui.rows, tile.ticks[0], "top", y);
      axis(ui.cols, tile.ticks[1], "left", x);
      ui.top.hidden = !strip(ui.top, tile.shards[1], "left", "width", x);
      ui.side.hidden = !strip(ui.side, tile.shards[0], "top", "height", y);
      cuts(ui.cuts, tile.shards, x, y);
    }
    mark();
    ui.plot.dataset.view = JSON.stringify(view);
  };

  // --- the cell under the pointer or the cursor

  const pixelAt = (row, col) => {
    if (!tile) return null;
    const i = Math.floor((row - tile.rows[0]) / tile.cells[0]), j = Math.floor((col - tile.cols[0]) / tile.cells[1]);
    const inside = i >= 0 && j >= 0 && i < tile.size[0] && j < tile.size[1];
    if (!inside) return null;
    const [r, c] = [tile.rows[0] + i * tile.cells[0], tile.cols[0] + j * tile.cells[1]];
    return { at: i * tile.size[1] + j, rows: [r, Math.min(R, r + tile.cells[0])], cols: [c, Math.min(C, c + tile.cells[1])] };
  };
  const mark = () => {
    const p = cursor && pixelAt(...cursor);
    ui.mark.hidden = !p;
    if (!p) return;
    const s = ui.mark.style;
    s.left = x(p.cols[0]) + "%"; s.top = y(p.rows[0]) + "%";
    s.width = x(p.cols[1]) - x(p.cols[0]) + "%"; s.height = y(p.rows[1]) - y(p.rows[0]) + "%";
  };
  const look = (row, col) => {
    cursor = [row, col];
    mark();
    const p = pixelAt(row, col);
    if (!p) return;
    const one = p.rows[1] - p.rows[0] === 1 && p.cols[1] - p.cols[0] === 1;
    const name = tile.names?.[p.rows[0] - tile.rows[0]];
    const column = tile.columns?.[p.cols[0] - tile.cols[0]] ?? `column ${p.cols[0]}`;
    const where = one && name !== undefined ? name + column
      : `rows ${p.rows[0]}–${p.rows[1] - 1}, columns ${p.cols[0]}–${p.cols[1] - 1}`;
    ui.read.textContent = `${where}: ${rough(p.at)}`;
    clearTimeout(rest);
    if (one && tile.values && info.about.endsWith("float32")) return; // exact already
    rest = setTimeout(() => { question = { kind: "probe", rows: p.rows, cols: p.cols, how: tile.how }; pump(); }, 120);
  };
  const rough = (at) => {
    const q = tile.index[at], [lo, hi] = tile.range;
    if (tile.values) return Number(tile.values[at].toPrecision(7)).toString();
    if (q === 0) return "NaN";
    return (q === 255 ? "≥ " : q === 1 && tile.signed ? "≤ " : "≈ ") + show(lo + ((q - 1) / 254) * (hi - lo));
  };

  // --- moving

  const go = (v, delay = 0) => {
    view = { ...settle(v.r0, v.r1, R, 2, "r"), ...settle(v.c0, v.c1, C, 4, "c") };
    paint();
    want(delay);
  };
  const settle = (a, b, size, least, key) => {
    const span = clamp(b - a, Math.min(least, size), size), start = clamp((a + b - span) / 2, 0, size - span);
    return { [key + "0"]: start, [key + "1"]: start + span };
  };
  const zoom = (k, row, col, delay) => {
    const b = box(), high = b.height / (view.r1 - view.r0), wide = b.width / (view.c1 - view.c0);
    const down = k < 1 && high > 14 && high > 3 * wide ? 1 : k; // rows that can be read stay while columns are crowded,
    const along = k < 1 && wide > 14 && wide > 3 * high ? 1 : k; // and the other way round
    go({
      r0: row - (row - view.r0) * down, r1: row + (view.r1 - row) * down,
      c0: col - (col - view.c0) * along, c1: col + (view.c1 - col) * along,
    }, delay);
  };
  const pan = (rows, cols, delay) => go({ r0: view.r0 + rows, r1: view.r1 + rows, c0: view.c0 + cols, c1: view.c1 + cols }, delay);
  const cellAt = (event) => {
    const b = ui.canvas.getBoundingClientRect(), fx = clamp((event.clientX - b.left) / b.width, 0, 0.99999);
    const fy = clamp((event.clientY - b.top) / b.height, 0, 0.99999);
    return [view.r0 + fy * (view.r1 - view.r0), view.c0 + fx * (view.c1 - view.c0)];
  };
  const reset = () => go(whole);

  const on = {
    wheel(event) {
      const out = event.deltaY > 0, full = view.r1 - view.r0 >= R && view.c1 - view.c0 >= C;
      if (out && full) return; // nothing to zoom out of: the page scrolls
      event.preventDefault();
      const delay = event.timeStamp - wheeled < 200 ? 60 : 0; // the first notch at once, a spinning wheel when it rests
      wheeled = event.timeStamp;
      zoom(Math.exp(clamp(event.deltaY, -120, 120) * 0.004), ...cellAt(event), delay);
    },
    pointerdown(event) {
      if (event.button) return;
      ui.canvas.focus({ preventScroll: true });
      ui.canvas.setPointerCapture(event.pointerId);
      drag = { at: [event.clientX, event.clientY], cell: cellAt(event), view: { ...view }, box: event.shiftKey || ui.boxes() };
    },
    pointermove(event) {
      if (!drag) return look(...cellAt(event));
      const b = box(), [dx, dy] = [event.clientX - drag.at[0], event.clientY - drag.at[1]];
      if (drag.box) return outline(drag.cell, cellAt(event));
      view = drag.view;
      pan((-dy / b.height) * (view.r1 - view.r0), (-dx / b.width) * (view.c1 - view.c0), 80);
    },
    pointerup(event) {
      if (!drag) return;
      const [a, b, moved] = [drag.cell, cellAt(event), Math.abs(event.clientX - drag.at[0]) + Math.abs(event.clientY - drag.at[1]) > 5];
      if (drag.box && moved) go({ r0: Math.floor(Math.min(a[0], b[0])), r1: Math.ceil(Math.max(a[0], b[0])), c0: Math.floor(Math.min(a[1], b[1])), c1: Math.ceil(Math.max(a[1], b[1])) });
      drag = null;
      ui.box.hidden = true;
    },
    pointercancel() { drag = null; ui.box.hidden = true; },
    pointerleave() { if (!drag) { cursor = null; clearTimeout(rest); mark(); } },
    dblclick: reset,
    keydown(event) {
      const [h, w] = tile ? tile.cells : [1, 1], middle = [(view.r0 + view.r1) / 2, (view.c0 + view.c1) / 2];
      const way = KEYS[event.key];
      if (way && event.shiftKey) pan((way[0] * (view.r1 - view.r0)) / 4, (way[1] * (view.c1 - view.c0)) / 4);
      else if (way) step(way[0] * h, way[1] * w, middle);
      else if (event.key === "+" || event.key === "=") zoom(1 / 1.5, ...(cursor ?? middle));
      else if (event.key === "-" || event.key === "_") zoom(1.5, ...(cursor ?? middle));
      else if (event.key === "Home") reset();
      else return;
      event.preventDefault();
      event.stopPropagation(); // or the notebook takes arrows and + for itself
    },
  };
  const step = (rows, cols, middle) => {
    const [row, col] = cursor ?? middle, to = [clamp(row + rows, 0, R - 0.5), clamp(col + cols, 0, C - 0.5)];
    const dr = to[0] < view.r0 ? to[0] - view.r0 : to[0] >= view.r1 ? to[0] - view.r1 + 0.5 : 0;
    const dc = to[1] < view.c0 ? to[1] - view.c0 : to[1] >= view.c1 ? to[1] - view.c1 + 0.5 : 0;
    if (dr || dc) pan(dr + Math.sign(dr) * Math.abs(rows), dc + Math.sign(dc) * Math.abs(cols), 80);
    look(...to);
  };
  const outline = (a, b) => {
    const s = ui.box.style, [r, c] = [Math.min(a[0], b[0]), Math.min(a[1], b[1])];
    ui.box.hidden = false;
    s.left = x(c) + "%"; s.top = y(r) + "%";
    s.width = x(Math.max(a[1], b[1])) - x(c) + "%"; s.height = y(Math.max(a[0], b[0])) - y(r) + "%";
  };

  ui.canvas.addEventListener("wheel", on.wheel, { passive: false });
  for (const name of ["pointerdown", "pointermove", "pointerup", "pointercancel", "pointerleave", "dblclick", "keydown"])
    ui.canvas.addEventListener(name, on[name]);
  ui.how.onchange = () => { how = ui.how.value; range = null; ui.fit(false); want(); };
  ui.fitted.onclick = () => { range = range ? null : "view"; ui.fit(!!range); want(); };
  ui.home.onclick = reset;
  const resized = new ResizeObserver(() => { paint(); want(tile ? 120 : 0); });
  resized.observe(ui.plot);
  model.on("msg:custom", landed);
  return () => {
    resized.disconnect();
    model.off("msg:custom", landed);
    [timer, rest, busy].forEach(clearTimeout);
  };
}

// --- the page's nodes

function build(el, info) {
  const [R] = info.size;
  const root = make("div", "fk-map", el);
  make("style", "", root, STYLE);
  const head = make("div", "fk-head", root);
  make("span", "fk-title", head, info.title);
  make("span", "fk-soft", head, info.about);
  if (info.evidence) make("span", "fk-tag", head, info.evidence).title = "how the shards' places in the whole are known";
  const tools = make("div", "fk-tools", head);
  const how = make("select", "", tools);
  how.setAttribute("aria-label", "What a pixel stands for");
  how.title = "what a pixel says of its cells";
  for (const [key, label] of info.hows) make("option", "", how, label).value = key;
  const fitted = make("button", "", tools, "fit colours");
  fitted.title = "spread the colours over the range of what is on screen";
  const boxed = make("button", "", tools, "box");
  boxed.title = "drag zooms to a box instead of panning";
  const home = make("button", "", tools, "reset");
  home.title = HELP;
  const press = (button, down) => button.setAttribute("aria-pressed", String(down));
  press(fitted, false);
  press(boxed, false);
  boxed.onclick = () => press(boxed, boxed.getAttribute("aria-pressed") !== "true");

  const body = make("div", "fk-body", root);
  const top = make("div", "fk-strip fk-top", body);
  top.hidden = true;
  const rows = make("div", "fk-rows", body);
  rows.style.width = clamp(info.gutter * 6.6 + 14, 24, 170) + "px";
  rows.style.gridColumn = "1";
  const plot = make("div", "fk-plot", body);
  plot.style.height = clamp(R * 20, 44, 380) + "px";
  const canvas = make("canvas", "", plot);
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${info.label}. ${HELP}.`);
  const cuts = make("div", "", plot);
  const mark = make("div", "fk-mark", plot);
  const box = make("div", "fk-box", plot);
  mark.hidden = box.hidden = true;
  const side = make("div", "fk-strip fk-side", body);
  side.hidden = true;
  const bar = make("div", "fk-bar", body);
  bar.style.gridColumn = "4";
  const ramp = make("canvas", "", bar);
  ramp.setAttribute("aria-hidden", "true");
  const cols = make("div", "fk-cols", body);
  const foot = make("div", "fk-foot", root);
  const says = make("span", "fk-says", foot);
  const busy = make("span", "fk-busy", foot);
  const read = make("div", "fk-read", foot);
  read.setAttribute("aria-live", "polite");
  return {
    tools, how, fitted, home, top, rows, plot, canvas, cuts, mark, box, side, cols, says, busy, read,
    fit: (down) => press(fitted, down),
    boxes: () => boxed.getAttribute("aria-pressed") === "true",
    legend: (m, lut) => legend(bar, ramp, m, lut),
  };
}

function palettes(data) {
  const colour = (i) => (255 << 24) | (data[i * 3 + 2] << 16) | (data[i * 3 + 1] << 8) | data[i * 3];
  return [0, 256].map((start) => Uint32Array.from({ length: 256 }, (_, i) => colour(start + i)));
}

function legend(bar, ramp, m, lut) {
  Object.assign(ramp, { width: 1, height: 255 });
  const pen = ramp.getContext("2d"), image = pen.createImageData(1, 255), pixels = new Uint32Array(image.data.buffer);
  for (let i = 0; i < 255; i++) pixels[i] = lut[255 - i];
  pen.putImageData(image, 0, 0);
  for (const node of bar.querySelectorAll("bdi")) node.remove();
  const [lo, hi] = m.range, few = bar.clientHeight < 80 ? 4 : 1; // a low bar has room for its ends only
  m.bar.forEach(([value, label], i) => {
    if (i % few) return;
    const node = make("bdi", "", bar, label), share = (hi - value) / (hi - lo);
    node.style.top = `calc(${share * 100}% - ${share * 12}px)`;
  });
}

function axis(node, ticks, side, place) {
  node.replaceChildren();
  for (const [cell, label] of ticks) {
    const at = place(cell + 0.5);
    if (at < 0 || at > 100) continue;
    const text = make("bdi", "", node, label);
    text.dir = "ltr"; // or a token written from the right would turn its own index around
    text.style[side] = make("i", "", node).style[side] = at + "%";
    text.title = label;
  }
}

function strip(node, pieces, side, extent, place) {
  node.replaceChildren();
  for (const [start, stop, label] of pieces) {
    const [a, b] = [clamp(place(start), 0, 100), clamp(place(stop), 0, 100)];
    if (a === b) continue;
    const piece = make("span", "", node, label);
    piece.style[side] = a + "%";
    piece.style[extent] = b - a + "%";
    piece.title = `${label}: ${start}–${stop - 1}`;
  }
  return pieces.length > 0;
}

function cuts(node, [rows, cols], x, y) {
  node.replaceChildren();
  const line = (style) => Object.assign(make("div", "fk-cut", node).style, style);
  for (const [start] of cols.slice(1)) line({ left: x(start) + "%", top: 0, bottom: 0, borderLeftWidth: "1px" });
  for (const [start] of rows.slice(1)) line({ top: y(start) + "%", left: 0, right: 0, borderTopWidth: "1px" });
}

export default { render };
