// Decay over distance with its fits, and spectra.

const PLOT = { width: 340, height: 230, left: 52, right: 12, top: 12, bottom: 34 };

function curve(m) {
  const dots = [...pairs()].map(([i, j]) => ({ i, j, d: distance(i, j), y: m.at(i, j) })).filter((p) => p.d >= 0 && p.y > 0 && Number.isFinite(p.y));
  const fit = DATA.fits[m.name];
  const values = [...dots.map((p) => p.y), ...(fit ? fit.mean : [])];
  if (!values.length) return null;
  const spread = [Math.min(...values) / 1.4, Math.max(...values) * 1.4]; // logarithmic, so that fits are straight
  const y = (v) => PLOT.height - PLOT.bottom - ((PLOT.height - PLOT.top - PLOT.bottom) * Math.log(v / spread[0])) / Math.log(spread[1] / spread[0]);
  const x = (d) => PLOT.left + ((PLOT.width - PLOT.left - PLOT.right) * (d + 0.5)) / (FARTHEST + 1);
  const svg = el("svg", { viewBox: `0 0 ${PLOT.width} ${PLOT.height}`, role: "img", "aria-label": `${m.symbol} against distance${fit ? `: ${said(fit)}` : ""}` });
  for (const v of ticks(...spread, true))
    svg.append(el("line", { x1: PLOT.left, x2: PLOT.width - PLOT.right, y1: y(v), y2: y(v), class: "rule" }), el("text", { x: PLOT.left - 6, y: y(v), "text-anchor": "end", "dominant-baseline": "central" }, powerOf(v)));
  const every = Math.ceil((FARTHEST + 1) / 12);
  for (let d = 0; d <= FARTHEST; d += every) svg.append(el("text", { x: x(d), y: PLOT.height - PLOT.bottom + 15, "text-anchor": "middle" }, d));
  svg.append(el("text", { x: (PLOT.left + PLOT.width - PLOT.right) / 2, y: PLOT.height - 4, "text-anchor": "middle", class: "axis" }, "distance"));
  for (const p of dots) svg.append(el("circle", { cx: x(p.d), cy: y(p.y), r: 2.5, class: "dot", "data-pair": `${p.i} ${p.j}` }));
  if (fit) {
    const line = fit.distance.map((d) => `${x(d)} ${y(Math.max(Math.exp(fit.intercept + fit.slope * d), spread[0]))}`);
    svg.append(el("path", { d: `M ${line.join(" L ")}`, class: "fit" }));
    fit.distance.forEach((d, k) => svg.append(el("circle", { cx: x(d), cy: y(fit.mean[k]), r: 4, class: "mean" }, el("title", {}, `distance ${d}: mean ${figure(fit.mean[k])} of ${fit.pairs[k]} pairs`))));
  }
  const caption = el("figcaption", {}, el("strong", {}, m.symbol), " ", ...formula(m.title));
  return el("figure", { "data-curve": m.name }, caption, svg, el("p", { class: "said" }, fit ? said(fit) : "No line: it is positive at one distance alone."));
}

function said(fit) {
  const [low, high] = fit.interval, r = fit.r_squared === null ? "–" : fit.r_squared.toFixed(3);
  return `slope ${figure(fit.slope)} [${figure(low)}, ${figure(high)}] a step, factor ${figure(Math.exp(fit.slope))}, R² = ${r}`;
}

function drawCurves() {
  const found = ["resonance", "coupling", "stable_rank"].map((name) => curve(METRIC[name])).filter((each) => each !== null);
  find("curves").replaceChildren(...found);
  markDots();
}

function markDots() {
  for (const dot of document.querySelectorAll("circle.dot")) dot.classList.toggle("kept", STATE.pair !== null && dot.dataset.pair === STATE.pair.join(" "));
}

function drawSpectra() {
  const all = DATA.spectra;
  find("spectra").hidden = all === null;
  if (all === null) return;
  const bins = all.blocks[0]?.shares.length ?? 0;
  const rows = all.blocks.map((block) => {
    const most = Math.max(...block.shares), bars = block.shares.map((share, k) => el("i", { class: k < (bins - 1) / 2 ? "below" : k > (bins - 1) / 2 ? "above" : "about", style: `height:${share > 0 ? Math.max(6, (100 * share) / most) : 0}%` }));
    const shape = el("span", { class: "bars", role: "img", "aria-label": `eigenvalues from ${figure(block.low)} to ${figure(block.high)}` }, ...bars);
    return el("tr", {}, el("th", { scope: "row", class: "name" }, block.name), el("td", {}, shape), ...[block.low, block.high].map((x) => el("td", {}, figure(x))), el("td", {}, `${(100 * block.negative).toFixed(1)} %`), el("td", {}, block.exact ? "all eigenvalues" : "quadrature"));
  });
  const decades = el("span", { class: "ends" }, el("span", {}, `−${brief(all.top)}`), el("span", {}, "0"), el("span", {}, brief(all.top)));
  const head = el("tr", {}, el("th", {}, "block"), el("th", {}, decades), ...["λ min", "λ max", "below 0", "from"].map((text) => el("th", { scope: "col" }, text)));
  find("densities").replaceChildren(el("table", { class: "list" }, el("thead", {}, head), el("tbody", {}, ...rows)));
}
