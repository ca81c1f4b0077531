// The linked heat maps: tables, so that keyboards, screen readers and printers have them too.

const TILES = new Map(); // metric's name -> Map("i j" -> cell)
const tall = () => {
  const n = STATE.order.length;
  return n <= 6 ? 54 : n <= 10 ? 42 : n <= 20 ? 24 : n <= 40 ? 16 : 11;
};

/** What a metric's cells are coloured by. */
function tint(m) {
  const all = [...pairs()];
  if (STATE.view === "values") {
    const by = scale(all.map(([i, j]) => m.at(i, j)));
    return { ...by, colours: SEQUENCE, colour: (i, j) => (m.at(i, j) > 0 ? mix(SEQUENCE, by.at(m.at(i, j))) : null), bare: (i, j) => brief(m.at(i, j)) };
  }
  const ratio = (i, j) => (CHANGE.has(i) && CHANGE.has(j) ? Math.log2(CHANGE.after(m, i, j) / m.at(i, j)) : NaN);
  const sizes = all.map(([i, j]) => Math.abs(ratio(i, j))).filter(Number.isFinite);
  const most = Math.max(...sizes, Math.log2(1.5));
  const colour = (i, j) => (Number.isNaN(ratio(i, j)) ? null : mix(BOTH, 0.5 + ratio(i, j) / most / 2));
  return { low: -most, high: most, log: false, colours: BOTH, colour, bare: (i, j) => times(2 ** ratio(i, j)), label: "log₂ of after / before" };
}
const times = (x) => (Number.isNaN(x) ? "–" : `×${brief(x)}`);

function words(m, i, j) {
  if (STATE.view === "values") return `${m.text(i, j)}${m.how(i, j) === "z" ? "" : `, ${METHODS[m.how(i, j)]}`}`;
  if (!CHANGE.has(i) || !CHANGE.has(j)) return "in this report alone";
  const score = CHANGE.score(m, i, j);
  return `${figure(m.at(i, j))} → ${figure(CHANGE.after(m, i, j))} (${sigma(score)})`;
}
function sigma(score) {
  if (Number.isNaN(score)) return "undefined";
  if (!Number.isFinite(score)) return "both exact";
  return `${score < 0 ? "−" : "+"}${Math.abs(score).toFixed(1)} σ`;
}

function map(m) {
  const by = tint(m), cells = new Map(), wide = tall() >= 42;
  const head = el("tr", {}, el("td", {}), ...STATE.order.map((j) => el("th", { scope: "col", "data-j": j }, el("span", {}, POINTS[j].short))));
  const rows = STATE.order.map((i) => {
    const row = el("tr", {}, el("th", { scope: "row", "data-i": i }, POINTS[i].short));
    for (const j of STATE.order) {
      const colour = by.colour(i, j), zero = STATE.view === "values" && m.how(i, j) === "z";
      const kind = [zero ? "zero" : colour === null ? "none" : dark(colour) ? "dark" : "bright", tall() > 16 && m.how(i, j) === "p" && STATE.view === "values" ? "probe" : ""];
      const cell = el("td", { class: kind.join(" ").trim(), "data-i": i, "data-j": j, tabindex: "-1", role: "gridcell", "aria-label": words(m, i, j), style: colour ? `background:${css(colour)}` : null }, wide ? by.bare(i, j) : "");
      cells.set(`${i} ${j}`, cell);
      row.append(cell);
    }
    return row;
  });
  TILES.set(m.name, cells);
  const first = cells.get(`${STATE.order[0]} ${STATE.order[0]}`);
  if (first) first.tabIndex = 0;
  const table = el("table", { class: wide ? "map few" : "map", role: "grid", "data-metric": m.name, "aria-label": `${m.symbol}, ${m.title}`, style: `--cell:${tall()}px` }, el("thead", {}, head), el("tbody", {}, ...rows));
  const title = el("figcaption", {}, el("strong", {}, m.symbol), " ", ...formula(m.title));
  return el("figure", {}, title, el("div", { class: "wide" }, table), legend(by.colours, by.low, by.high, by.log, by.label));
}

function drawMaps() {
  TILES.clear();
  const shown = METRICS.filter((m) => STATE.maps.has(m.name));
  find("estimated").hidden = tall() <= 16 || STATE.view !== "values" || !METRICS.some((m) => m.method.includes("p"));
  find("grid").replaceChildren(...(STATE.order.length ? shown.map(map) : [el("p", {}, "No point has such a name.")]));
  align();
  markPair();
}

/** Maps in as many columns as fit, with rows of about the same length. */
function align() {
  const grid = find("grid"), count = grid.children.length, gap = 34;
  grid.style.gridTemplateColumns = "max-content";
  const widest = Math.max(1, ...[...grid.children].map((each) => each.scrollWidth));
  const most = Math.min(count, Math.max(1, Math.floor((grid.clientWidth + gap) / (widest + gap))));
  const columns = Math.ceil(count / Math.ceil(count / most));
  grid.style.gridTemplateColumns = columns > 1 ? `repeat(${columns}, max-content)` : "minmax(0, max-content)";
}

function markPair() {
  for (const cell of document.querySelectorAll('table.map td[aria-selected="true"]')) cell.removeAttribute("aria-selected");
  if (STATE.pair === null) return;
  const [i, j] = STATE.pair;
  for (const cells of TILES.values()) for (const key of [`${i} ${j}`, `${j} ${i}`]) cells.get(key)?.setAttribute("aria-selected", "true");
}

let lit = [];
/** Show a pair in every map, and its figures beside the pointer. */
function light(cell) {
  for (const each of lit) each.classList.remove("lit");
  lit = [];
  if (cell === null) return tip(null);
  const [i, j] = [Number(cell.dataset.i), Number(cell.dataset.j)];
  for (const table of document.querySelectorAll("table.map"))
    lit.push(TILES.get(table.dataset.metric).get(`${i} ${j}`), table.querySelector(`th[data-i="${i}"]`), table.querySelector(`th[data-j="${j}"]`));
  for (const each of lit) each.classList.add("lit");
  tip(cell, i, j);
}

function move(cell, key) {
  const row = cell.parentElement, table = cell.closest("table"), rows = [...table.tBodies[0].rows];
  let [r, c] = [rows.indexOf(row), cell.cellIndex];
  const last = STATE.order.length;
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -last], End: [0, last], PageUp: [-last, 0], PageDown: [last, 0] };
  if (!(key in steps)) return false;
  [r, c] = [Math.min(Math.max(r + steps[key][0], 0), last - 1), Math.min(Math.max(c + steps[key][1], 1), last)];
  for (const each of table.querySelectorAll('td[tabindex="0"]')) each.tabIndex = -1;
  rows[r].cells[c].tabIndex = 0;
  rows[r].cells[c].focus();
  return true;
}

function watchMaps() {
  const grid = find("grid"), cellOf = (event) => event.target.closest?.("td[data-i]") ?? null;
  addEventListener("resize", align);
  grid.addEventListener("pointerover", (event) => light(cellOf(event)));
  grid.addEventListener("pointerleave", () => light(null));
  grid.addEventListener("focusin", (event) => light(cellOf(event)));
  grid.addEventListener("focusout", () => light(null));
  grid.addEventListener("click", (event) => { const cell = cellOf(event); if (cell) keep(Number(cell.dataset.i), Number(cell.dataset.j)); });
  grid.addEventListener("keydown", (event) => {
    const cell = cellOf(event);
    if (cell === null) return;
    if (event.key === "Enter" || event.key === " ") keep(Number(cell.dataset.i), Number(cell.dataset.j));
    else if (event.key === "Escape") light(null);
    else if (!move(cell, event.key)) return;
    event.preventDefault();
  });
}
