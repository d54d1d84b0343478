"use strict";
/* Draws a report from the JSON and the compressed columns that the page carries. Names of models,
 * nodes and operations only ever reach the page as text nodes, never as markup. */

const $ = (id) => document.getElementById(id);

/** An element with attributes and children (strings become text). */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") Object.assign(element.style, value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function drawn(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/* ---------------------------------------------------------------------------- quantities */

function scaled(value, steps, unit) {
  if (!value) return `0 ${unit}`;
  const [factor, prefix] = steps.find(([f]) => Math.abs(value) >= f) || steps[steps.length - 1];
  return `${Number((value / factor).toPrecision(4))} ${prefix}${unit}`;
}
const UP = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""]];
const BINARY = [[2 ** 50, "Pi"], [2 ** 40, "Ti"], [2 ** 30, "Gi"], [2 ** 20, "Mi"], [2 ** 10, "Ki"], [1, ""]];
const seconds = (s) => scaled(s, [[1, ""], [1e-3, "m"], [1e-6, "µ"], [1e-9, "n"]], "s");
const bytes = (b) => scaled(b, BINARY, "B");
const rate = (r, unit) => scaled(r, UP, unit);
const percent = (x) => `${(100 * x).toFixed(x && x < 0.0995 ? 1 : 0)} %`;

/* --------------------------------------------------------------------------------- tooltip */

const tip = {
  show(event, title, rows) {
    const box = $("tip");
    box.replaceChildren(make("b", {}, title), facts(rows));
    box.style.display = "block";
    const { width, height } = box.getBoundingClientRect();
    box.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
    const below = event.clientY + 16;
    box.style.top = `${below + height < innerHeight ? below : Math.max(4, event.clientY - height - 10)}px`;
  },
  hide() { $("tip").style.display = "none"; },
};

function facts(rows) {
  const list = make("dl");
  for (const [name, value] of rows) list.append(make("dt", {}, name), make("dd", {}, value));
  return list;
}

function table(head, rows, numeric = []) {
  const cell = (tag) => (value, i) => {
    const element = make(tag, numeric.includes(i) ? { class: "number" } : {});
    element.append(...(Array.isArray(value) ? value : [value]));
    return element;
  };
  const body = rows.map((row) => make("tr", {}, ...row.map(cell("td"))));
  const parts = head.length ? [make("thead", {}, make("tr", {}, ...head.map(cell("th"))))] : [];
  return make("table", {}, ...parts, make("tbody", {}, ...body));
}

const swatch = (colour) => make("span", { class: "swatch", style: { background: colour } });

function section(id, title, note) {
  const element = make("section", { id }, make("h2", {}, title));
  if (note) element.append(make("p", { class: "note" }, note));
  $("main").append(element);
  return element;
}

function legend(entries) {
  return make("div", { class: "legend" },
    ...entries.map(([name, colour]) => make("span", {}, swatch(colour), name)));
}

/* --------------------------------------------------------------------------------- summary */

function stackBar(parts, total) {
  const bar = make("div", { class: "stack" });
  for (const part of parts) {
    const piece = make("span", {
      style: { width: `${(100 * part.value) / total}%`, background: part.colour },
    });
    piece.addEventListener("pointermove", (event) =>
      tip.show(event, part.name, [["", part.text], ["share", percent(part.value / total)]]));
    piece.addEventListener("pointerleave", tip.hide);
    bar.append(piece);
  }
  return bar;
}

function drawSummary(data) {
  const element = section("summary", "Summary");
  if (data.fits === false) {
    element.append(make("p", { class: "bad" }, data.jobs
      ? "Not every job fits into the accelerators' memory." : "The plan does not fit into the accelerators' memory."));
  }
  const columns = make("div", { class: "columns" });
  const figures = table(data.figure_head, data.figures, data.figure_head.length && !data.jobs ? [1, 2, 3] : []);
  // of several jobs the figures are as wide as the page, each job's bar is a column below
  if (data.jobs) element.append(make("div", { class: "scroll jobs" }, figures));
  else columns.append(make("div", {}, figures));
  for (const { job, step_time: step, parts: given } of data.breakdowns) {
    const parts = given.map((p) => ({ ...p, text: seconds(p.value) }));
    columns.append(make("div", {},
      make("p", { class: "note" }, job ? `Where the step of ${job} goes (${seconds(step)}), mean over its ranks`
        : "Where the step's time goes, mean over all ranks"),
      stackBar(parts, step),
      table(["", "time", "share"],
        parts.map((p) => [[swatch(p.colour), p.name], p.text, percent(p.value / step)]),
        [1, 2])));
  }
  element.append(columns);
}

function drawBreakdown(data) {
  if (!data.rank_breakdown.length) return;
  const element = section("breakdown", "Step time by rank",
    `What the compute stream of each representative rank does during ${data.jobs ? "its job's" : "the"} step; what remains is waiting.`);
  const names = new Map();
  const bars = make("div", { class: "bars" });
  for (const row of data.rank_breakdown) {
    const parts = row.parts.map((p) => ({ ...p, text: seconds(p.value) }));
    parts.forEach((p) => names.set(p.name, p.colour));
    const busy = parts.filter((p) => p.name !== "waiting").reduce((sum, p) => sum + p.value, 0);
    bars.append(make("span", {}, row.label), stackBar(parts, data.step_time),
      make("span", { class: "value" }, `${percent(busy / row.step_time)} busy`));
  }
  element.append(legend([...names]), bars);
}

/* -------------------------------------------------------------------------------- timeline */

const GROUPS = 8192;  // different colours that one pixel can choose from
const GUTTER = 176, AXIS = 24, ROW = 15, PITCH = 17, HEAD = 20;

class Timeline {
  constructor(data, columns) {
    Object.assign(this, columns);
    this.data = data;
    this.rows = this.start.length;
    this.tick = data.tick;
    this.length = data.length;
    this.view = { from: 0, to: this.length };
    this.mode = "kind";
    this.matches = null;
    this.showPath = data.critical_rows.length > 0;
    this.hovered = this.picked = -1;
    this.busy = new Float64Array(this.rows + 1);
    for (let i = 0; i < this.rows; i++) {
      this.busy[i + 1] = this.busy[i] + (this.end[i] - this.start[i]);
    }
    this.trackOf = new Uint32Array(this.rows);
    let y = 0, group = null;
    this.heads = [];
    data.tracks.forEach((track, index) => {
      if (track.group !== group) {
        group = track.group;
        this.heads.push({ y, label: group });
        y += HEAD;
      }
      track.y = y;
      y += PITCH;
      this.trackOf.fill(index, track.first, track.last);
    });
    this.height = y + 6;
    this.palette = this.palettes();
    this.groups = {};
    for (const mode of ["kind", "phase", "stage", "layer"]) {
      const number = new Map(this.palette[mode].map((colour) => [colour, 0]));
      [...number.keys()].forEach((colour, n) => number.set(colour, Math.min(n, GROUPS - 1)));
      this.groups[mode] = Uint16Array.from(this.palette[mode], (colour) => number.get(colour));
    }
    this.weight = new Float64Array(GROUPS);
    this.touched = [];
    this.build();
  }

  palettes() {
    const t = this.data.templates;
    const hue = (n) => `hsl(${(n * 137.508) % 360} 52% 52%)`;
    const phases = { F: "#2f6db5", I: "#d55e00", W: "#3d8f86", O: "#8c6d4f" };
    return {
      kind: t.kind.map((k) => this.data.colours[k]),
      phase: t.phase.map((p) => phases[p] || "#9a9a9a"),
      stage: t.stage.map((s) => (s < 0 ? "#9a9a9a" : hue(s))),
      layer: t.layer.map((l) => (l < 0 ? "#9a9a9a" : hue(l))),
      hue,
    };
  }

  colour(i) {
    if (this.mode === "microbatch") {
      const m = this.microbatch[i];
      return m < 0 ? "#9a9a9a" : this.palette.hue(m);
    }
    return this.palette[this.mode][this.code[i]];
  }

  build() {
    const element = section("timeline", "Timeline",
      `${this.rows.toLocaleString("en")} operations on ${this.data.tracks.length} streams of ` +
      `${this.heads.length} representative rank${this.heads.length === 1 ? "" : "s"}. Wheel or +/- zooms, dragging or a/d ` +
      "pans, double click shows everything, a click keeps an operation's details.");
    const button = (text, label, action) => {
      const b = make("button", { type: "button", "aria-label": label, title: label }, text);
      b.addEventListener("click", action);
      return b;
    };
    const mode = make("select", { "aria-label": "Colour by" },
      ...[["kind", "kind"], ["phase", "phase"], ["microbatch", "micro-batch"], ["stage", "stage"], ["layer", "layer"]]
        .map(([value, name]) => make("option", { value }, `colour by ${name}`)));
    mode.addEventListener("change", () => { this.mode = mode.value; this.drawLegend(); this.refresh(); });
    const search = make("input", { type: "search", placeholder: "find operations", "aria-label": "Find operations" });
    search.addEventListener("input", () => this.find(search.value));
    this.found = make("span", { class: "note" });
    const tools = make("div", { class: "tools" },
      button("+", "Zoom in", () => this.zoom(0.5)), button("−", "Zoom out", () => this.zoom(2)),
      button("fit", "Show everything", () => this.fit()), mode, search, this.found);
    if (this.data.critical_rows.length) {
      const box = make("input", { type: "checkbox", id: "show-path" });
      box.checked = true;
      box.addEventListener("change", () => { this.showPath = box.checked; this.refresh(); });
      tools.append(make("label", {}, box, " critical path"));
    }
    this.legend = make("div");
    this.overview = make("canvas", { id: "overview", "aria-label": "Whole step; drag to move the view" });
    this.canvas = make("canvas", { id: "tracks", role: "img", "aria-label": "Timeline of operations per stream" });
    this.viewport = make("div", { class: "viewport", tabindex: "0" }, this.canvas, make("div", { class: "spacer" }));
    this.details = make("div", { id: "picked" });
    element.append(tools, this.legend, this.overview, this.viewport, this.details);
    this.drawLegend();
    this.listen();
    this.resize();
  }

  drawLegend() {
    const used = (values) => [...new Set(values)];
    let entries = [];
    if (this.mode === "kind") entries = used(this.data.templates.kind).map((k) => [k.replaceAll("_", " "), this.data.colours[k]]);
    if (this.mode === "phase") {
      entries = [["forward", "#2f6db5"], ["input gradient", "#d55e00"], ["weight gradient", "#3d8f86"], ["optimizer", "#8c6d4f"]];
    }
    if (entries.length && this.showPath) entries.push(["critical path", css("--select")]);
    this.legend.replaceChildren(legend(entries));
  }

  listen() {
    const canvas = this.canvas;
    let drag = null;
    new ResizeObserver(() => this.resize()).observe(this.viewport);
    this.viewport.addEventListener("scroll", () => this.refresh());
    canvas.addEventListener("wheel", (event) => {
      if (event.offsetX < GUTTER) return;
      event.preventDefault();
      if (Math.abs(event.deltaX) > Math.abs(event.deltaY) || event.shiftKey) {
        this.pan(((event.deltaX || event.deltaY) / this.plot) * this.span);
      } else {
        this.zoom(Math.exp(Math.max(-1, Math.min(1, event.deltaY * 0.0025))), this.time(event.offsetX));
      }
      this.hover(event);
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => {
      drag = { x: event.clientX, y: event.clientY, moved: false };
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!drag) return this.hover(event);
      const dx = event.clientX - drag.x, dy = event.clientY - drag.y;
      if (!drag.moved && Math.hypot(dx, dy) < 4) return undefined;
      tip.hide();
      drag = { x: event.clientX, y: event.clientY, moved: true };
      this.viewport.scrollTop -= dy;
      return this.pan((-dx / this.plot) * this.span);
    });
    canvas.addEventListener("pointerup", (event) => {
      if (drag && !drag.moved) this.pick(this.hit(event.offsetX, event.offsetY));
      drag = null;
    });
    canvas.addEventListener("pointercancel", () => { drag = null; });
    canvas.addEventListener("pointerleave", () => { this.hovered = -1; tip.hide(); this.refresh(); });
    canvas.addEventListener("dblclick", () => this.fit());
    this.viewport.addEventListener("keydown", (event) => {
      const act = {
        "+": () => this.zoom(0.7), "=": () => this.zoom(0.7), w: () => this.zoom(0.7),
        "-": () => this.zoom(1.4), s: () => this.zoom(1.4),
        a: () => this.pan(-0.1 * this.span), ArrowLeft: () => this.pan(-0.1 * this.span),
        d: () => this.pan(0.1 * this.span), ArrowRight: () => this.pan(0.1 * this.span),
        "0": () => this.fit(), Home: () => this.fit(), Escape: () => this.pick(-1),
      }[event.key];
      if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      act();
    });
    const jump = (event) => {
      const middle = ((event.offsetX - GUTTER) / this.plot) * this.length;
      this.show(middle - this.span / 2, middle + this.span / 2);
    };
    this.overview.addEventListener("pointerdown", (event) => { this.overview.setPointerCapture(event.pointerId); jump(event); });
    this.overview.addEventListener("pointermove", (event) => { if (event.buttons) jump(event); });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.refresh());
  }

  get span() { return this.view.to - this.view.from; }
  get plot() { return Math.max(50, this.width - GUTTER - 8); }
  time(x) { return this.view.from + ((x - GUTTER) / this.plot) * this.span; }
  x(t) { return GUTTER + ((t - this.view.from) / this.span) * this.plot; }

  show(from, to) {
    const span = Math.min(this.length, Math.max(to - from, this.length * 1e-7, 8 * this.tick));
    from = Math.max(0, Math.min(from, this.length - span));
    this.view = { from, to: from + span };
    this.refresh();
  }

  zoom(factor, around = (this.view.from + this.view.to) / 2) {
    this.show(around - (around - this.view.from) * factor, around + (this.view.to - around) * factor);
  }

  pan(by) { this.show(this.view.from + by, this.view.to + by); }
  fit() { this.show(0, this.length); }

  find(text) {
    const wanted = text.trim().toLowerCase();
    const names = this.data.templates.operation;
    this.matches = wanted ? Uint8Array.from(names, (n) => n.toLowerCase().includes(wanted)) : null;
    let count = 0, total = 0;
    if (this.matches) {
      for (let i = 0; i < this.rows; i++) {
        if (this.matches[this.code[i]]) { count += 1; total += this.end[i] - this.start[i]; }
      }
    }
    this.found.textContent = this.matches ? `${count.toLocaleString("en")} found, ${seconds(total * this.tick)} in all` : "";
    this.refresh();
  }

  /** First row of the track that ends after tick `t`. */
  after(track, t) {
    let low = track.first, high = track.last;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.end[middle] > t) high = middle; else low = middle + 1;
    }
    return low;
  }

  /** Busy ticks of a track between two ticks. */
  busyBetween(track, from, to) {
    const a = this.after(track, from);
    let b = this.after(track, to);
    if (b < track.last && this.start[b] < to) b += 1;
    if (b <= a) return 0;
    return this.busy[b] - this.busy[a] - Math.max(0, from - this.start[a]) - Math.max(0, this.end[b - 1] - to);
  }

  trackAt(y) {
    const within = y - AXIS + this.viewport.scrollTop;
    return y < AXIS ? undefined : this.data.tracks.find((t) => within >= t.y && within < t.y + PITCH);
  }

  /** Row under a point of the canvas; -1 if there is none within two pixels. */
  hit(x, y) {
    const track = this.trackAt(y);
    if (!track || x < GUTTER) return -1;
    const t = this.time(x) / this.tick, slack = (2 * this.span) / this.plot / this.tick;
    const i = this.after(track, t);
    if (i < track.last && this.start[i] <= t) return i;
    const before = i > track.first ? t - this.end[i - 1] : Infinity;
    const ahead = i < track.last ? this.start[i] - t : Infinity;
    if (Math.min(before, ahead) > slack) return -1;
    return before < ahead ? i - 1 : i;
  }

  describe(i) {
    const t = this.data.templates, k = this.code[i], track = this.data.tracks[this.trackOf[i]];
    const duration = (this.end[i] - this.start[i]) * this.tick;
    const rows = [["kind", t.kind[k].replaceAll("_", " ") + (t.phase[k] ? `, phase ${t.phase[k]}` : "")],
      ["where", `${track.group}, stream ${track.stream}`]];
    const place = [];
    if (t.stage[k] >= 0) place.push(`stage ${t.stage[k]}`);
    if (t.layer[k] >= 0) place.push(`layer ${t.layer[k]}`);
    if (this.microbatch[i] >= 0) place.push(`micro-batch ${this.microbatch[i]}`);
    if (place.length) rows.push(["belongs to", place.join(", ")]);
    rows.push(["start", seconds(this.start[i] * this.tick)], ["duration", seconds(duration)]);
    if (t.flops[k]) rows.push(["work", `${rate(t.flops[k], "FLOP")} (${rate(t.flops[k] / duration, "FLOP/s")})`]);
    if (t.bytes[k]) rows.push(["bytes", `${bytes(t.bytes[k])} (${rate(t.bytes[k] / duration, "B/s")})`]);
    const waited = this.waited[i];
    if (waited >= 0) {
      rows.push(["waited for", `${t.operation[this.code[waited]]} on ${this.data.tracks[this.trackOf[waited]].group}`]);
    }
    return { title: t.operation[k], rows };
  }

  hover(event) {
    const row = this.hit(event.offsetX, event.offsetY);
    if (row !== this.hovered) { this.hovered = row; this.refresh(); }
    if (row < 0) return tip.hide();
    const { title, rows } = this.describe(row);
    return tip.show(event, title, rows);
  }

  pick(row) {
    this.picked = row;
    this.details.replaceChildren();
    if (row >= 0) {
      const { title, rows } = this.describe(row);
      this.details.append(make("b", {}, title), facts(rows));
    }
    this.refresh();
  }

  resize() {
    const width = this.viewport.clientWidth;
    const height = Math.min(AXIS + this.height, Math.round(innerHeight * 0.74) - 2);
    if (width === this.width && height === this.shown) return;
    this.width = width;
    this.shown = height;
    this.viewport.lastChild.style.height = `${AXIS + this.height - height}px`;
    const scale = devicePixelRatio || 1;
    for (const [canvas, h] of [[this.canvas, height], [this.overview, 30]]) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(h * scale);
      canvas.style.height = `${h}px`;
      canvas.getContext("2d").setTransform(scale, 0, 0, scale, 0, 0);
    }
    this.draw();
  }

  refresh() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => { this.waiting = false; this.draw(); });
  }

  draw() {
    const c = this.canvas.getContext("2d");
    const top = this.viewport.scrollTop;
    c.fillStyle = css("--paper");
    c.fillRect(0, 0, this.width, this.shown);
    c.font = '11px system-ui, "DejaVu Sans", sans-serif';
    c.textBaseline = "middle";
    const ink = css("--ink"), soft = css("--soft"), idle = css("--idle");
    for (const track of this.data.tracks) {
      const y = AXIS + track.y - top;
      if (y + PITCH < AXIS || y > this.shown) continue;
      c.globalAlpha = 1;
      c.fillStyle = soft;
      c.fillText(clipped(c, track.stream, GUTTER - 24), 18, y + ROW / 2);
      c.fillStyle = idle;
      c.fillRect(GUTTER, y, this.plot, ROW);
      this.drawTrack(c, track, y);
    }
    c.globalAlpha = 1;
    for (const head of this.heads) {
      const y = AXIS + head.y - top;
      if (y + HEAD < 0 || y > this.shown) continue;
      c.fillStyle = ink;
      c.font = '600 11px system-ui, "DejaVu Sans", sans-serif';
      c.fillText(head.label, 6, y + HEAD / 2 + 1, this.width - 12);
    }
    if (this.showPath) this.drawPath(c, top);
    for (const row of [this.hovered, this.picked]) if (row >= 0) this.outline(c, row, top);
    if (this.picked >= 0 && this.waited[this.picked] >= 0) this.arrow(c, this.waited[this.picked], this.picked, top);
    this.drawAxis(c);
    this.drawOverview();
  }

  /** Cost is bounded by pixels, not by operations: what is thinner than a pixel is skipped in one
   * binary search, and drawn as one column as opaque as that pixel's time is busy. */
  drawTrack(c, track, y) {
    const perPixel = this.span / this.plot / this.tick;
    const from = this.view.from / this.tick, to = this.view.to / this.tick;
    let i = this.after(track, from), colour = null, done = -1;
    const paint = (fill, alpha, x, width) => {
      if (fill !== colour) { c.fillStyle = fill; colour = fill; }
      c.globalAlpha = alpha;
      c.fillRect(x, y, width, ROW);
    };
    while (i < track.last && this.start[i] < to) {
      const faded = this.matches && !this.matches[this.code[i]] ? 0.13 : 1;
      const left = Math.max(0, (this.start[i] - from) / perPixel);
      const right = Math.min(this.plot, (this.end[i] - from) / perPixel);
      if (right - left >= 1) {
        const width = right - left;
        paint(this.colour(i), faded, GUTTER + left, width > 3 ? width - 0.5 : width);
        if (width > 44) {
          c.fillStyle = colour = "#ffffff";
          c.globalAlpha = faded;
          c.save();
          c.beginPath();
          c.rect(GUTTER + left, y, width - 4, ROW);
          c.clip();
          c.fillText(this.data.templates.operation[this.code[i]], GUTTER + left + 4, y + ROW / 2 + 0.5);
          c.restore();
          colour = null;
        }
        i += 1;
      } else {
        // what began in the pixel before and reaches into this one belongs here
        const pixel = Math.max(Math.floor(left), done + 1), low = from + pixel * perPixel;
        done = pixel;
        const share = this.busyBetween(track, low, low + perPixel) / perPixel;
        let shown = i, next = i + 1;
        if (next < track.last && this.end[next] <= low + perPixel) {
          next = this.after(track, low + perPixel);
          shown = this.dominant(i, next);
        }
        const dim = this.matches && !this.matches[this.code[shown]] ? 0.13 : 1;
        paint(this.colour(shown), (0.3 + 0.7 * Math.min(1, share)) * dim, GUTTER + pixel, 1);
        i = Math.max(i + 1, next);
      }
    }
  }

  /** Of the operations [first, last) one of the colour that takes most of their time; of many a
   * part is looked at. Where something is searched for, what was found counts. */
  dominant(first, last) {
    const stride = Math.max(1, Math.floor((last - first) / 96)), groups = this.groups[this.mode];
    let best = first, most = -1;
    this.touched.length = 0;
    for (let i = first; i < last; i += stride) {
      const g = groups ? groups[this.code[i]] : Math.min(this.microbatch[i] + 1, GROUPS - 1);
      if (this.weight[g] === 0) this.touched.push(g);
      const found = this.matches && this.matches[this.code[i]] ? 1e6 : 1;
      this.weight[g] += (this.end[i] - this.start[i]) * found + 1e-3;
      if (this.weight[g] > most) { most = this.weight[g]; best = i; }
    }
    for (const g of this.touched) this.weight[g] = 0;
    return best;
  }

  drawPath(c, top) {
    const path = this.data.critical_rows;
    c.strokeStyle = css("--select");
    c.lineWidth = 1.5;
    c.globalAlpha = 0.85;
    c.beginPath();
    let lastX = -1, lastY = -1;
    for (const i of path) {
      const a = this.x(this.start[i] * this.tick), b = this.x(this.end[i] * this.tick);
      if (b < GUTTER || a > GUTTER + this.plot) { lastX = -1; continue; }
      const y = AXIS + this.data.tracks[this.trackOf[i]].y + ROW - 1 - top;
      if (lastX >= 0 && b - lastX < 0.7 && y === lastY) continue;
      const left = Math.max(GUTTER, a), right = Math.min(GUTTER + this.plot, b);
      if (lastX < 0) c.moveTo(left, y); else c.lineTo(left, y);
      c.lineTo(right, y);
      lastX = right;
      lastY = y;
    }
    c.save();
    c.clip(this.plotArea());
    c.stroke();
    c.restore();
    c.globalAlpha = 1;
  }

  plotArea() {
    const area = new Path2D();
    area.rect(GUTTER, AXIS, this.plot, this.shown - AXIS);
    return area;
  }

  box(row, top) {
    return {
      left: this.x(this.start[row] * this.tick), right: this.x(this.end[row] * this.tick),
      y: AXIS + this.data.tracks[this.trackOf[row]].y - top,
    };
  }

  outline(c, row, top) {
    const { left, right, y } = this.box(row, top);
    c.save();
    c.clip(this.plotArea());
    c.strokeStyle = css("--select");
    c.lineWidth = 1.5;
    c.strokeRect(left - 0.5, y - 0.5, Math.max(2, right - left) + 1, ROW + 1);
    c.restore();
  }

  arrow(c, source, target, top) {
    const a = this.box(source, top), b = this.box(target, top);
    c.save();
    c.clip(this.plotArea());
    c.strokeStyle = c.fillStyle = css("--accent");
    c.lineWidth = 1.5;
    c.beginPath();
    c.moveTo(a.right, a.y + ROW / 2);
    c.bezierCurveTo(a.right + 24, a.y + ROW / 2, b.left - 24, b.y + ROW / 2, b.left, b.y + ROW / 2);
    c.stroke();
    c.beginPath();
    c.moveTo(b.left + 1, b.y + ROW / 2);
    c.lineTo(b.left - 6, b.y + ROW / 2 - 4);
    c.lineTo(b.left - 6, b.y + ROW / 2 + 4);
    c.fill();
    c.restore();
  }

  drawAxis(c) {
    c.globalAlpha = 1;
    c.font = '11px system-ui, "DejaVu Sans", sans-serif';
    c.fillStyle = css("--panel");
    c.fillRect(0, 0, this.width, AXIS - 2);
    c.strokeStyle = css("--line");
    c.fillStyle = css("--soft");
    const [ticks, label] = axisTicks(this.view.from, this.view.to, Math.max(2, this.plot / 120));
    for (const t of ticks) {
      const x = Math.round(this.x(t)) + 0.5;
      c.beginPath();
      c.moveTo(x, AXIS - 8);
      c.lineTo(x, AXIS - 2);
      c.stroke();
      c.fillText(label(t), Math.min(x + 4, this.width - 60), 11);
    }
  }

  drawOverview() {
    const c = this.overview.getContext("2d");
    c.clearRect(0, 0, this.width, 30);
    const compute = this.data.tracks.filter((t) => t.stream === "compute").slice(0, 32);
    const shown = compute.length ? compute : this.data.tracks.slice(0, 32);
    if (this.profileWidth !== this.width) {
      this.profileWidth = this.width;
      const columns = Math.floor(this.plot), step = this.length / this.tick / columns;
      this.profile = Array.from({ length: columns }, (_, p) =>
        shown.reduce((sum, t) => sum + this.busyBetween(t, p * step, (p + 1) * step), 0) / step / shown.length);
    }
    c.fillStyle = css("--idle");
    c.fillRect(GUTTER, 3, this.plot, 24);
    c.fillStyle = css("--soft");
    this.profile.forEach((share, p) => c.fillRect(GUTTER + p, 27 - 24 * share, 1, 24 * share));
    c.font = '11px system-ui, "DejaVu Sans", sans-serif';
    c.fillText("compute busy", 18, 18, GUTTER - 24);
    const a = GUTTER + (this.view.from / this.length) * this.plot;
    const b = GUTTER + (this.view.to / this.length) * this.plot;
    c.strokeStyle = css("--accent");
    c.lineWidth = 2;
    c.strokeRect(a, 2, Math.max(2, b - a), 26);
  }
}

/** As much of a text as fits into a width of the canvas. */
function clipped(c, text, width) {
  if (c.measureText(text).width <= width) return text;
  let length = text.length;
  while (length && c.measureText(`${text.slice(0, length)}…`).width > width) length -= 1;
  return `${text.slice(0, length)}…`;
}

/** About `count` round times between two, and how to label them. */
function axisTicks(from, to, count) {
  const raw = (to - from) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= raw);
  const [factor, unit] = to >= 1 ? [1, "s"] : to >= 1e-3 ? [1e3, "ms"] : [1e6, "µs"];
  const digits = Math.max(0, Math.ceil(-Math.log10(step * factor) - 1e-9));
  const ticks = [];
  for (let n = Math.ceil(from / step); n * step <= to; n++) ticks.push(n * step);
  return [ticks, (t) => `${(t * factor).toFixed(digits)} ${unit}`];
}

/* ---------------------------------------------------------------------------------- memory */

function drawMemory(data) {
  const memory = data.memory;
  if (!memory) return;
  const element = section("memory", "Memory", memory.note);
  const most = Math.max(memory.capacity, ...memory.stages.map((s) => s.total)) * 1.04;
  const bars = make("div", { class: "bars" });
  for (const stage of memory.stages) {
    const parts = stage.parts.map((p) => ({ ...p, text: bytes(p.value) }));
    const bar = stackBar(parts, most);
    const limit = make("span", { class: "limit", style: { left: `${(100 * stage.capacity) / most}%` } });
    bar.append(limit);
    const over = stage.total > stage.capacity;
    bars.append(make("span", {}, stage.label), bar,
      make("span", { class: over ? "value bad" : "value" }, bytes(stage.total) + (over ? ", does not fit" : "")));
  }
  element.append(legend([...memory.legend, [`capacity, ${memory.capacities.map(bytes).join(", ")}`, css("--bad")]]), bars);
  if (memory.curves.length) element.append(memoryChart(data));
}

function memoryChart(data) {
  const { curves, capacities } = data.memory;
  const W = 1200, H = 300, left = 76, right = 14, top = 14, bottom = 28;
  const most = Math.max(...capacities, ...curves.map((c) => Math.max(...c.bytes))) * 1.05;
  const px = (t) => left + (t / data.length) * (W - left - right);
  const py = (b) => H - bottom - (b / most) * (H - top - bottom);
  const svg = drawn("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "Memory per stage over time" });
  const [ticks, label] = axisTicks(0, data.length, 9);
  for (const t of ticks) svg.append(drawn("text", { x: px(t), y: H - 8, "text-anchor": "middle", class: "soft" }, label(t)));
  const unit = 2 ** (10 * Math.floor(Math.log2(most) / 10));
  const step = [1, 2, 5, 10, 20, 50, 100, 200, 500].find((s) => most / unit / s <= 6) * unit;
  for (let b = 0; b <= most; b += step) {
    svg.append(drawn("line", { x1: left, x2: W - right, y1: py(b), y2: py(b), class: "axis" }),
      drawn("text", { x: left - 8, y: py(b) + 4, "text-anchor": "end", class: "soft" }, bytes(b)));
  }
  for (const capacity of capacities) {
    svg.append(drawn("line", { x1: left, x2: W - right, y1: py(capacity), y2: py(capacity),
      stroke: css("--bad"), "stroke-width": 1.5, "stroke-dasharray": "6 4" }));
  }
  const tone = (i) => `hsl(${215 - (200 * i) / Math.max(1, curves.length - 1)} 60% 50%)`;
  curves.forEach((curve, i) => {
    let d = `M${px(curve.times[0]).toFixed(1)} ${py(curve.bytes[0]).toFixed(1)}`;
    for (let k = 1; k < curve.times.length; k++) d += `H${px(curve.times[k]).toFixed(1)}V${py(curve.bytes[k]).toFixed(1)}`;
    svg.append(drawn("path", { d: `${d}H${px(data.length)}`, fill: "none", stroke: tone(i), "stroke-width": 1.5 }));
  });
  const cursor = drawn("line", { y1: top, y2: H - bottom, stroke: css("--soft"), visibility: "hidden" });
  svg.append(cursor);
  svg.addEventListener("pointermove", (event) => {
    const bounds = svg.getBoundingClientRect();
    const t = ((((event.clientX - bounds.left) / bounds.width) * W - left) / (W - left - right)) * data.length;
    if (t < 0 || t > data.length) return;
    cursor.setAttribute("x1", px(t));
    cursor.setAttribute("x2", px(t));
    cursor.setAttribute("visibility", "visible");
    const rows = curves.slice(0, 24).map((curve) => {
      let k = curve.times.findIndex((time) => time > t);
      if (k < 0) k = curve.times.length;
      return [curve.label, bytes(curve.bytes[Math.max(0, k - 1)])];
    });
    tip.show(event, `at ${seconds(t)}`, rows);
  });
  svg.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); tip.hide(); });
  const box = make("div", {}, make("p", { class: "note" }, "Memory over the step"),
    legend(curves.map((c, i) => [c.label, tone(i)])), svg);
  return box;
}

/* ----------------------------------------------------------------------------------- links */

/** Colour of a utilisation in 0..1: light grey, blue, amber, red. */
function heat(share) {
  const stops = [[0, [176, 182, 192]], [0.15, [98, 146, 208]], [0.5, [226, 160, 56]], [0.9, [190, 30, 36]], [1, [150, 10, 30]]];
  const s = Math.max(0, Math.min(1, share));
  const k = Math.max(1, stops.findIndex(([at]) => at >= s));
  const [a, low] = stops[k - 1], [b, high] = stops[k];
  return `rgb(${low.map((v, i) => Math.round(v + ((high[i] - v) * (s - a)) / (b - a))).join(" ")})`;
}

function drawLinks(data) {
  const net = data.network;
  if (!net) return;
  const element = section("network", "Links", net.note);
  const W = 1200, inner = Math.min(net.height * 78, 1000), H = inner + 90;
  const svg = drawn("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "Link utilisation on the topology" });
  const place = net.nodes.map((n) => ({ x: 30 + n.x * (W - 60), y: 26 + n.y * (inner - 26) }));
  const byRow = new Map();
  place.forEach((p) => byRow.set(p.y, (byRow.get(p.y) || 0) + 1));
  const spacing = (W - 60) / Math.max(...byRow.values()), rise = inner / Math.max(1, byRow.size - 1);
  /* Straight between tiers and neighbours, an arc past the nodes between them otherwise. */
  const path = (link) => {
    const a = place[link.from], b = place[link.to], dx = Math.abs(a.x - b.x), dy = Math.abs(a.y - b.y);
    if (link.from === link.to) {
      return `M${a.x - 9} ${a.y + 10}C${a.x - 34} ${a.y + 44} ${a.x + 34} ${a.y + 44} ${a.x + 9} ${a.y + 10}`;
    }
    const x = (a.x + b.x) / 2, y = (a.y + b.y) / 2;
    if (dy < 2 && dx > 1.5 * spacing) return `M${a.x} ${a.y}Q${x} ${y + 28 + Math.min(86, dx * 0.3)} ${b.x} ${b.y}`;
    if (dx < 2 && dy > 1.5 * rise) return `M${a.x} ${a.y}Q${x + 28 + Math.min(60, dy * 0.1)} ${y} ${b.x} ${b.y}`;
    return `M${a.x} ${a.y}L${b.x} ${b.y}`;
  };
  for (const link of [...net.links].sort((a, b) => a.max - b.max)) {
    const d = path(link);
    const line = drawn("path", { d, fill: "none", stroke: heat(link.max), "stroke-width": 1.2 + 3.3 * Math.min(1, link.max),
      "stroke-opacity": link.max > 0 ? 0.9 : 0.35 });
    const target = drawn("path", { d, fill: "none", stroke: "transparent", "stroke-width": 9 });
    target.addEventListener("pointermove", (event) => tip.show(event, link.label, link.facts));
    target.addEventListener("pointerleave", tip.hide);
    svg.append(line, target);
  }
  net.nodes.forEach((node, i) => {
    const { x, y } = place[i];
    const w = node.width, label = drawn("text", { x, y: y + 4, "text-anchor": "middle", "font-size": node.small ? 9 : 11 }, node.label);
    const box = drawn("g", {}, drawn("rect", { x: x - w / 2, y: y - 11, width: w, height: 22, rx: 4, class: "node" }), label);
    box.addEventListener("pointermove", (event) => tip.show(event, node.title, node.facts));
    box.addEventListener("pointerleave", tip.hide);
    svg.append(box);
  });
  element.append(legend([0, 0.15, 0.35, 0.6, 0.9].map((s) => [percent(s), heat(s)])), svg,
    make("div", { class: "scroll" },
      table(["links", "count", "bandwidth", "bytes per step", "mean use", "highest use"], net.table, [1, 2, 3, 4, 5])));
}

/* --------------------------------------------------------------------------- critical path */

function drawCritical(data, timeline) {
  const critical = data.critical;
  if (!critical) return;
  const element = section("critical", "Critical path", critical.note);
  const columns = make("div", { class: "columns" });
  columns.append(make("div", {}, stackBar(critical.kinds.map((k) => ({ ...k, text: seconds(k.value) })), critical.total),
    table(["on the path", "time", "share"], critical.kinds.map((k) =>
      [[swatch(k.colour), k.name], seconds(k.value), percent(k.value / critical.total)]), [1, 2])));
  const rows = critical.longest.map((step) => {
    const go = make("button", { type: "button" }, "show");
    go.addEventListener("click", () => {
      const width = Math.max(step.duration * 6, data.length * 1e-5);
      timeline.show(step.start - width / 2, step.start + step.duration + width / 2);
      timeline.pick(step.row);
      $("timeline").scrollIntoView({ behavior: "smooth" });
    });
    return [step.operation, step.where, seconds(step.start), seconds(step.duration), step.row >= 0 ? [go] : ""];
  });
  columns.append(make("div", { class: "scroll" }, table(["longest pieces", "where", "start", "duration", ""], rows, [2, 3])));
  element.append(columns);
}

/* ----------------------------------------------------------------------------------- tables */

function drawTables(data) {
  for (const entry of data.tables) {
    const element = section(entry.id, entry.title, entry.note);
    element.append(make("div", { class: "scroll" }, table(entry.head, entry.rows, entry.numeric)));
  }
  if (data.experiment) {
    section("experiment", "Experiment").append(make("pre", {}, data.experiment));
  }
}

/* ------------------------------------------------------------------------------------ start */

/** For browsers without `Uint8Array.fromBase64`. */
function fromBase64(text) {
  const plain = atob(text), bytes = new Uint8Array(plain.length);
  for (let i = 0; i < plain.length; i++) bytes[i] = plain.charCodeAt(i);
  return bytes;
}

async function column(name, type) {
  const text = $(`column-${name}`).textContent;
  const packed = Uint8Array.fromBase64 ? Uint8Array.fromBase64(text) : fromBase64(text);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new type(await new Response(stream).arrayBuffer());
}

async function start() {
  const data = JSON.parse($("data").textContent);
  $("subtitle").textContent = data.subtitle;
  drawSummary(data);
  const [gap, duration, code, microbatch, waited] = await Promise.all([
    column("gap", Uint32Array), column("duration", Uint32Array), column("code", Uint32Array),
    column("microbatch", Int32Array), column("waited", Int32Array)]);
  const n = gap.length, from = new Uint32Array(n), to = new Uint32Array(n);
  for (const track of data.tracks) {
    for (let i = track.first, t = 0; i < track.last; i++) {
      from[i] = t + gap[i];
      t = to[i] = from[i] + duration[i];
    }
  }
  for (let i = 0; i < n; i++) waited[i] = waited[i] === 0 ? -1 : i - waited[i];
  const timeline = n ? new Timeline(data, { start: from, end: to, code, microbatch, waited }) : null;
  drawBreakdown(data);
  drawMemory(data);
  drawLinks(data);
  if (timeline) drawCritical(data, timeline);
  drawTables(data);
  window.report = { data, timeline, operations: n };
  requestAnimationFrame(() => requestAnimationFrame(() => {
    performance.mark("painted");
    document.documentElement.dataset.ready = "true";
  }));
}

start().catch((error) => {
  document.documentElement.dataset.ready = "failed";
  $("main").append(make("p", { class: "bad" }, `This report could not be drawn: ${error.message}`));
  throw error;
});
