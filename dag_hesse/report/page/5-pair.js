// A pair's figures: beside the pointer, and at the side for the pair that is kept.

function tip(cell, i, j) {
  const box = find("tip");
  box.hidden = cell === null;
  if (cell === null) return;
  box.replaceChildren(...heading(i, j), figures(i, j));
  const at = cell.getBoundingClientRect(), size = box.getBoundingClientRect();
  const left = at.right + 12 + size.width > innerWidth ? at.left - size.width - 12 : at.right + 12;
  box.style.left = `${Math.max(4, left)}px`;
  box.style.top = `${Math.max(4, Math.min(at.top - 8, innerHeight - size.height - 4))}px`;
}

function heading(i, j) {
  const named = (k) => el("span", { class: "name" }, ...broken(POINTS[k].name));
  return i === j ? [el("p", { class: "names" }, named(i))] : [el("p", { class: "names" }, named(i), el("br"), named(j))];
}

/** A row a metric: value, standard error, method; or before, after and their difference in standard errors. */
function figures(i, j) {
  const rows = METRICS.map((m) => {
    const value = m.at(i, j), off = m.off(i, j);
    if (STATE.view === "change" && CHANGE.has(i) && CHANGE.has(j))
      return [m, figure(value), `→ ${figure(CHANGE.after(m, i, j))}`, sigma(CHANGE.score(m, i, j))];
    return [m, m.how(i, j) === "z" ? "0" : figure(value), off > 0 ? `± ${figure(off)}` : "", METHODS[m.how(i, j)]];
  });
  return el("table", { class: "figures" }, el("tbody", {}, ...rows.map(([m, ...texts]) =>
    el("tr", { "data-metric": m.name }, el("th", { scope: "row" }, m.symbol), ...texts.map((text) => el("td", {}, text))))));
}

const apart = (i, j) => (distance(i, j) < 0 ? "never meet" : `distance ${distance(i, j)}`);
const size = (k) => `${POINTS[k].kind}, ${POINTS[k].shape.join("×") || "scalar"} = ${POINTS[k].dim}`;

function drawPair() {
  const side = find("pair"), title = el("h2", { id: "pair-title" }, "Pair");
  if (STATE.pair === null) return side.replaceChildren(title, el("p", { class: "hint" }, "None is kept yet: click a cell or a row."));
  const [i, j] = STATE.pair, reason = why(i, j), name = (k) => JSON.stringify(POINTS[k].name);
  const rows = [[POINTS[i].name, size(i)], ...(i === j ? [] : [[POINTS[j].name, size(j)]])];
  const close = el("button", { type: "button", class: "quiet", "aria-label": "let the pair go" }, "×");
  close.addEventListener("click", () => keep(null));
  side.replaceChildren(
    el("div", { class: "title" }, title, close),
    el("dl", {}, ...rows.flatMap(([a, b]) => [el("dt", { class: "name" }, ...broken(a)), el("dd", {}, b)])),
    figures(i, j),
    el("p", {}, ...formula(`${apart(i, j)}; rank of H_GN per sample ≤ ${DATA.rank[place(i, j)]}`)),
    ...(reason ? [el("p", {}, ...formula(reason))] : []),
    el("pre", {}, el("code", {}, `report[${name(i)}, ${name(j)}]\nreport.block(${name(i)}, ${name(j)})`)),
  );
}

/** Keep a pair everywhere, or none. */
function keep(i, j) {
  const [a, b] = STATE.pair ?? [-1, -1];
  STATE.pair = i === null || (a === Math.min(i, j) && b === Math.max(i, j)) ? null : [Math.min(i, j), Math.max(i, j)];
  drawPair();
  markPair();
  drawGraph();
  markRow();
  markDots();
}
