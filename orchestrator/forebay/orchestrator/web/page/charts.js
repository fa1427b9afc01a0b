// Charts of the last minutes, drawn as SVG at the size they have on the screen.

const NS = "http://www.w3.org/2000/svg";
const LEFT = 44, RIGHT = 8, TOP = 8, BOTTOM = 20;

function svg(name, attributes, parent) {
  const node = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (parent) parent.append(node);
  return node;
}

/** Returns round numbers from 0 to at least `top`, about three of them. */
export function ticksTo(top) {
  if (!(top > 0)) return [0, 1];
  const rough = top / 3;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((each) => each * power).find((each) => each >= rough && (power >= 1 || each > 0)) ?? rough;
  const ticks = [];
  for (let value = 0; value < top + step * 0.999; value += step) ticks.push(Number(value.toPrecision(6)));
  return ticks;
}

/** A plot over the last `span` milliseconds. */
export class Chart {
  constructor(parent, { label, span, format, log = false, whole = false, none = "" }) {
    Object.assign(this, { parent, label, span, format, log, whole, none });
    this.lines = [];
    this.marks = [];
    this.now = 0;
    this.root = svg("svg", { role: "img" });
    this.tip = document.createElement("div");
    this.tip.className = "tip";
    this.tip.hidden = true;
    this.blank = document.createElement("div");
    this.blank.className = "none";
    this.blank.textContent = none;
    parent.append(this.root, this.blank, this.tip);
    new ResizeObserver(() => this.draw()).observe(parent);
    parent.addEventListener("pointermove", (event) => {
      this.pointer = event.clientX - parent.getBoundingClientRect().left;
      this.pointerY = event.clientY - parent.getBoundingClientRect().top;
      this.draw();
    });
    parent.addEventListener("pointerleave", () => {
      this.pointer = undefined;
      this.draw();
    });
  }

  /** Shows lines `{name, series, points: [[ms, value]]}` and marks `{ms, value, series, text}` as of `now`. */
  show(now, { lines = [], marks = [], summary }) {
    Object.assign(this, { now, lines, marks });
    this.root.setAttribute("aria-label", `${this.label}. ${summary}`);
    this.draw();
  }

  draw() {
    const width = this.parent.clientWidth, height = this.parent.clientHeight;
    if (!width || !this.now) return;
    this.root.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.root.replaceChildren();
    const begin = this.now - this.span;
    const x = (ms) => LEFT + ((ms - begin) / this.span) * (width - LEFT - RIGHT);
    const [ticks, y] = this.scale(begin, height);
    for (const tick of ticks) {
      svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(tick), y2: y(tick) }, this.root);
      svg("text", { x: LEFT - 7, y: y(tick) + 4, "text-anchor": "end" }, this.root).textContent = this.format(tick);
    }
    const minutes = Math.round(this.span / 60000);
    for (let minute = 0; minute <= minutes; minute++) {
      const anchor = minute === 0 ? "end" : minute === minutes ? "start" : "middle";
      const text = svg("text", { x: x(this.now - minute * 60000), y: height - 4, "text-anchor": anchor }, this.root);
      text.textContent = minute === 0 ? "now" : minute === minutes ? `−${minute} min` : `−${minute}`;
    }
    let isEmpty = true;
    const radius = this.marks.length > 120 ? 2.7 : 4;
    for (const line of this.lines) {
      const points = line.points.filter(([ms]) => ms >= begin - 2000);
      if (points.length < 2) continue;
      isEmpty = false;
      const clipped = points.map(([ms, value]) => [Math.max(LEFT, x(ms)), y(value)]);
      const path = clipped.map(([px, py], index) => `${index ? "L" : "M"}${px.toFixed(1)} ${py.toFixed(1)}`).join("");
      const floor = y(0).toFixed(1);
      svg("path", { class: `area s${line.series}`, d: `${path}L${clipped.at(-1)[0].toFixed(1)} ${floor}L${clipped[0][0].toFixed(1)} ${floor}Z` }, this.root);
      svg("path", { class: `line s${line.series}`, d: path }, this.root);
    }
    for (const mark of this.marks) {
      if (mark.ms < begin) continue;
      isEmpty = false;
      svg("circle", { class: `mark s${mark.series}`, cx: x(mark.ms).toFixed(1), cy: y(mark.value).toFixed(1), r: radius }, this.root);
    }
    this.blank.hidden = !(isEmpty && this.none);
    this.point(x, y, begin, width, height);
  }

  scale(begin, height) {
    const values = [
      ...this.lines.flatMap((line) => line.points.filter(([ms]) => ms >= begin).map(([, value]) => value)),
      ...this.marks.filter((mark) => mark.ms >= begin).map((mark) => mark.value),
    ];
    const bottom = height - BOTTOM, room = bottom - TOP;
    if (this.log) {
      const low = Math.floor(Math.log10(Math.max(0.001, Math.min(0.1, ...values))));
      const high = Math.max(low + 2, Math.ceil(Math.log10(Math.max(1, ...values))));
      const ticks = [];
      for (let power = low; power <= high; power++) ticks.push(10 ** power);
      const y = (value) => bottom - ((Math.log10(Math.max(value, 10 ** low)) - low) / (high - low)) * room;
      return [ticks, y];
    }
    const top = Math.max(this.whole ? 3 : 1, ...values);
    const ticks = ticksTo(top);
    return [ticks, (value) => bottom - (value / ticks.at(-1)) * room];
  }

  point(x, y, begin, width, height) {
    if (this.pointer === undefined) {
      this.tip.hidden = true;
      return;
    }
    let text = "", at = this.pointer;
    const near = this.marks
      .filter((mark) => mark.ms >= begin)
      .map((mark) => [Math.hypot(x(mark.ms) - this.pointer, y(mark.value) - this.pointerY), mark])
      .filter(([distance]) => distance < 24)
      .sort((one, other) => one[0] - other[0])[0];
    if (near) {
      at = x(near[1].ms);
      text = near[1].text;
    } else if (this.lines.length && this.lines[0].points.length) {
      const moment = begin + ((this.pointer - LEFT) / (width - LEFT - RIGHT)) * this.span;
      const points = this.lines[0].points;
      let best = 0;
      points.forEach(([ms], index) => {
        if (Math.abs(ms - moment) < Math.abs(points[best][0] - moment)) best = index;
      });
      if (Math.abs(points[best][0] - moment) < 3000) {
        at = x(points[best][0]);
        svg("line", { class: "cross", x1: at, x2: at, y1: TOP, y2: height - BOTTOM }, this.root);
        text = this.lines.map((line) => `${line.name} ${this.format(line.points[best]?.[1] ?? 0)}`).join(" · ");
      }
    }
    this.tip.hidden = !text;
    this.tip.textContent = text;
    const left = Math.min(Math.max(0, at + 10), Math.max(0, width - this.tip.offsetWidth - 4));
    this.tip.style.transform = `translate(${left}px, ${TOP}px)`;
  }
}
