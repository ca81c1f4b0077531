// The table of pairs, what was proved, facts and times.

const SOME = 100; // rows until all are asked for
const COLUMNS = [
  { key: "v", title: "v", of: ([i]) => POINTS[i].name },
  { key: "w", title: "w", of: ([, j]) => POINTS[j].name },
  { key: "distance", title: "distance", of: (p) => distance(...p), text: (p) => (distance(...p) < 0 ? "–" : distance(...p)) },
  ...METRICS.map((m) => ({ key: m.name, title: m.symbol, of: (p) => m.at(...p), text: (p) => m.text(...p), how: (p) => METHODS[m.how(...p)] })),
];

function sorted() {
  const { key, down } = STATE.sort, column = COLUMNS.find((c) => c.key === key), sign = down ? -1 : 1;
  const order = (a, b) => (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);
  return [...pairs()].map((p) => [column.of(p), p]).sort(([a], [b]) => {
    if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b); // last, either way
    return sign * order(a, b);
  }).map(([, p]) => p);
}

function drawRows() {
  const found = sorted(), shown = STATE.all ? found : found.slice(0, SOME);
  const head = COLUMNS.map((c) => {
    const on = STATE.sort.key === c.key, button = el("button", { type: "button" }, c.title);
    button.addEventListener("click", () => {
      STATE.sort = { key: c.key, down: on ? !STATE.sort.down : typeof c.of([0, 0]) !== "string" };
      drawRows();
      find("rows").querySelectorAll("thead button")[COLUMNS.indexOf(c)].focus();
    });
    return el("th", { scope: "col", "aria-sort": on ? (STATE.sort.down ? "descending" : "ascending") : "none" }, button);
  });
  const rows = shown.map((p) => {
    const row = el("tr", { "data-pair": p.join(" "), tabindex: "0" }, ...COLUMNS.map((c, k) =>
      el("td", { class: k < 2 ? "name" : c.how ? c.how(p) : null, title: c.how ? c.how(p) : null }, ...(k < 2 ? broken(c.of(p)) : [String((c.text ?? c.of)(p))]))));
    row.addEventListener("click", () => keep(...p));
    row.addEventListener("keydown", (event) => { if (event.key === "Enter") keep(...p); });
    return row;
  });
  find("rows").replaceChildren(el("table", { class: "list pairs" }, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows)));
  find("more").hidden = shown.length === found.length;
  find("more").textContent = `Show all ${found.length} pairs`;
  markRow();
}

function markRow() {
  for (const row of document.querySelectorAll("table.pairs tbody tr")) row.setAttribute("aria-selected", STATE.pair !== null && row.dataset.pair === STATE.pair.join(" "));
}

function drawProved() {
  const rows = DATA.proved.map((row) => el("tr", {}, el("th", { scope: "row" }, ...formula(row.what)), el("td", {}, row.pairs), el("td", {}, row.why)));
  const head = el("tr", {}, ...["zero", "pairs", "why"].map((text) => el("th", { scope: "col" }, text)));
  find("proved").replaceChildren(rows.length ? el("table", { class: "list text" }, el("thead", {}, head), el("tbody", {}, ...rows)) : el("p", {}, "Nothing: every pair meets in the loss and in an op of the model that has a second derivative."));
}

function drawFacts() {
  find("facts").replaceChildren(...Object.entries(DATA.facts).flatMap(([key, text]) => [el("dt", {}, key.replaceAll("_", " ")), el("dd", {}, text || "–")]));
  const { total, ...stages } = DATA.seconds;
  const rows = Object.entries(stages).map(([stage, s]) => el("tr", {}, el("th", { scope: "row" }, stage), el("td", { class: "share" }, el("i", { style: `width:${((100 * s) / (total || 1)).toFixed(1)}%` })), el("td", {}, `${figure(s)} s`)));
  find("times").replaceChildren(el("table", { class: "list" }, el("tbody", {}, ...rows), el("tfoot", {}, el("tr", {}, el("th", { scope: "row" }, "total"), el("td", {}), el("td", {}, `${figure(total)} s`)))));
  find("again").hidden = !DATA.call;
  find("call").textContent = DATA.call;
}
