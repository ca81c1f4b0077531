// The data block of the page, and what of it is shown.

const METHODS = { e: "exact", g: "gram", p: "probes", z: "zero", s: "skipped" };
const DATA = JSON.parse(document.getElementById("data").textContent);
const POINTS = DATA.points, N = POINTS.length;

function floats(text, Kind) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new Kind(bytes.buffer);
}

/** Where the pair (i, j) of n points is in a packed matrix. */
function place(i, j, n = N, whole = DATA.whole) {
  if (whole) return i * n + j;
  if (i > j) [i, j] = [j, i];
  return i * n - (i * (i - 1)) / 2 + j - i;
}

const METRICS = DATA.metrics.map((m) => {
  const value = floats(m.value, Float64Array);
  const stderr = m.stderr === null ? null : floats(m.stderr, Float32Array);
  return {
    ...m,
    at: (i, j) => value[place(i, j)],
    off: (i, j) => (stderr === null ? 0 : stderr[place(i, j)]),
    how: (i, j) => m.method[place(i, j)],
    text: (i, j) => number(value[place(i, j)], stderr === null ? 0 : stderr[place(i, j)], m.method[place(i, j)]),
  };
});
const METRIC = Object.fromEntries(METRICS.map((m) => [m.name, m]));
const distance = (i, j) => DATA.distance[place(i, j)];

const CHANGE = DATA.against === null ? null : changes(DATA.against);

/** The other report, over the points that both have. */
function changes(other) {
  const n = other.places.length, at = new Map(other.places.map((point, k) => [point, k]));
  const read = (texts, Kind) => texts.map((text) => floats(text, Kind));
  const after = read(other.after, Float64Array), score = read(other.score, Float32Array);
  const find = (arrays, m, i, j) => arrays[m][place(at.get(i), at.get(j), n, arrays[m].length === n * n && n > 1)];
  return {
    has: (i) => at.has(i),
    after: (m, i, j) => find(after, METRICS.indexOf(m), i, j),
    score: (m, i, j) => find(score, METRICS.indexOf(m), i, j),
  };
}

const STATE = {
  order: [...POINTS.keys()], // points that are shown, in the order in which they are
  maps: new Set(["resonance", "coupling", "stable_rank", "gn_gap"]),
  view: "values",
  pair: null, // kept
  sort: { key: "resonance", down: true },
  all: false, // rows of the table
};

/** A regular expression of a filter: a glob if it has signs of one, else any part of a name. */
function filterOf(text) {
  const part = (piece) =>
    piece === "**" ? ".*" : piece === "*" ? "[^.]*" : piece === "?" ? "[^.]" : piece.replace(/[.+^${}()|[\]\\]/g, "\\$&");
  const body = text.split(/(\*\*|\*|\?)/).map(part).join("");
  return new RegExp(/[*?]/.test(text) ? `^${body}$` : body, "is");
}

function arrange(text, order) {
  const wanted = filterOf(text), shown = [...POINTS.keys()].filter((k) => wanted.test(POINTS[k].name));
  const R = METRIC.resonance;
  if (order === "name") shown.sort((a, b) => POINTS[a].name.localeCompare(POINTS[b].name, "en", { numeric: true }));
  if (order === "strength") shown.sort((a, b) => R.at(b, b) - R.at(a, a));
  return shown;
}

/** Unordered pairs of what is shown. */
function* pairs() {
  for (let a = 0; a < STATE.order.length; a++)
    for (let b = a; b < STATE.order.length; b++) {
      const [i, j] = [STATE.order[a], STATE.order[b]];
      yield i < j ? [i, j] : [j, i];
    }
}

/** Why a pair's block or a part of it is zero, if that is proved. */
function why(i, j) {
  const zero = (m) => METRIC[m].how(i, j) === "z", { apart, block, gn, tensor } = DATA.why;
  if (zero("resonance")) return `H = 0: ${distance(i, j) < 0 ? apart : block}.`;
  return [zero("gn_norm") ? `H_GN = 0: ${gn}.` : "", zero("tensor_norm") ? `H_T = 0: ${tensor}.` : ""].join(" ").trim();
}
