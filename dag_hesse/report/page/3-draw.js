// Elements, colours and axes.

const SVG = "http://www.w3.org/2000/svg";
// Blue, grey, orange: told apart by all eyes, and by lightness from the middle.
const DIVERGING = "0b3c78 2166ac 4a92c6 8fbfdc c9dbe6 e4e4e4 f2d3b3 eeae72 d97f2c b3560b 7a3402";
const rgb = (hex) => [0, 2, 4].map((k) => parseInt(hex.slice(k, k + 2), 16));
const stops = (text) => text.split(" ").map(rgb);
const SEQUENCE = stops(DATA.colours), BOTH = stops(DIVERGING);

/** An element with attributes and children; text is text, whatever it holds. */
function el(name, attributes = {}, ...children) {
  const node = SHAPES.has(name) ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value !== null && value !== undefined) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
const SHAPES = new Set(["svg", "g", "path", "circle", "line", "rect", "text"]);
const find = (id) => document.getElementById(id);

function mix(colours, t) {
  const x = Math.min(Math.max(t, 0), 1) * (colours.length - 1), k = Math.min(Math.floor(x), colours.length - 2);
  return colours[k].map((c, d) => Math.round(c + (x - k) * (colours[k + 1][d] - c)));
}
const css = (c) => `rgb(${c.join(" ")})`;
/** Whether white stands out from a colour better than black: by its luminance. */
const dark = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, share, k) => sum + share * (c[k] / 255) ** 2.2, 0) < 0.179;

/** A dotted name that may be broken after its dots. */
const broken = (name) => name.split(/(?<=\.)/).flatMap((part) => [part, el("wbr")]).slice(0, -1);

/** A formula with its subscripts: H_GN. */
const formula = (text) => text.split(/_(\w+)/).map((piece, k) => (k % 2 ? el("sub", {}, piece) : piece));

/** From values to [0, 1]: by logarithms where they span more than a factor of 20. */
function scale(values) {
  const known = values.filter((x) => x > 0 && Number.isFinite(x));
  const low = Math.min(...known), high = Math.max(...known), log = known.length > 0 && high > 20 * low;
  const bottom = log ? low : 0, top = known.length ? high : 1;
  const [a, b] = log ? [Math.log(bottom), Math.log(top)] : [bottom, top];
  return { log, low: bottom, high: top, at: (x) => (log ? (Math.log(x) - a) / (b - a) : x / b) };
}

/** A few round numbers from low to high. */
function ticks(low, high, log) {
  if (log) {
    const from = Math.floor(Math.log10(low)), to = Math.floor(Math.log10(high) + 1e-9), decades = Math.log10(high / low);
    const step = Math.max(1, Math.ceil(decades / 5)), found = [];
    for (let k = from; k <= to; k += step) for (const m of decades < 2.5 ? [1, 3] : [1]) found.push(Number(`${m}e${k}`));
    return found.filter((x) => x >= low * (1 - 1e-9) && x <= high * (1 + 1e-9));
  }
  const rough = (high - low) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((m) => m * power >= rough) * power, found = [];
  for (let k = Math.ceil(low / step); k * step <= high * (1 + 1e-9); k++) found.push(Number((k * step).toPrecision(6)));
  return found;
}

function powerOf(x) {
  if (x <= 0) return x < 0 ? `−${powerOf(-x)}` : "0";
  const k = Math.round(Math.log10(x));
  return (x >= 0.01 && x < 1000) || Math.abs(x / 10 ** k - 1) > 1e-6 ? brief(x).replace(".0e", "e") : `1e${k}`;
}

/** A bar of colours under its numbers. */
function legend(colours, low, high, log, label) {
  const bar = el("span", { class: "bar", style: `background:linear-gradient(to right, ${colours.map(css).join(",")})` });
  const at = (x) => (log ? Math.log(x / low) / Math.log(high / low) : (x - low) / (high - low));
  const marks = ticks(low, high, log).map((x) => el("span", { style: `left:${(100 * at(x)).toFixed(2)}%` }, powerOf(x)));
  return el("div", { class: "legend", role: "img", "aria-label": `colours from ${brief(low)} to ${brief(high)}${log ? ", logarithmic" : ""}` },
    bar, el("div", { class: "marks" }, ...marks), el("span", { class: "kind" }, label ?? (log ? "log scale" : "linear scale")));
}
