// The graph of the points: a row each in topological order, as logs of versions are drawn, with arcs beside it.

/** Edges lead between points at distance 1, downwards. */
function children(k) {
  const found = [];
  for (let u = k + 1; u < N; u++) if (distance(k, u) === 1) found.push(u);
  return found;
}

/** Per point its lane, and per edge the lane it runs in between its ends. */
function lanes() {
  const heading = [], own = [], edges = []; // heading: per lane, the point that it leads to
  const free = () => { const k = heading.indexOf(undefined); return k < 0 ? heading.length : k; };
  for (let v = 0; v < N; v++) {
    const here = heading.indexOf(v);
    own[v] = here < 0 ? free() : here;
    for (let k = 0; k < heading.length; k++) if (heading[k] === v) heading[k] = undefined;
    for (const u of children(v)) {
      let lane = heading.indexOf(u);
      if (lane < 0) { lane = heading[own[v]] === undefined ? own[v] : free(); heading[lane] = u; }
      edges.push({ v, u, lane });
    }
  }
  return { own, edges, count: Math.max(1, heading.length) };
}

const LANES = lanes();
const FARTHEST = Math.max(1, ...DATA.distance);

function drawGraph() {
  const step = N > 40 ? 17 : N > 20 ? 20 : 26, gap = Math.max(7, Math.min(16, 160 / LANES.count)), letter = 7.3;
  const names = Math.max(...POINTS.map((p) => p.name.length)) * letter + 16;
  const x = (lane) => 12 + gap * lane, y = (k) => 14 + step * k;
  const left = x(LANES.count - 1) + 14, right = left + names, room = Math.min(320, 70 + N * 5);
  const R = METRIC.resonance, by = scale(Array.from({ length: N * N }, (_, k) => R.at(Math.floor(k / N), k % N)));
  const colour = (i, j) => (R.at(i, j) > 0 ? css(mix(SEQUENCE, by.at(R.at(i, j)))) : "var(--line)");
  const svg = el("svg", { width: right + room, height: y(N - 1) + 16, viewBox: `0 0 ${right + room} ${y(N - 1) + 16}`, role: "group", "aria-label": "graph of the points" });
  for (const { v, u, lane } of LANES.edges) {
    const [a, b, c] = [x(LANES.own[v]), x(lane), x(LANES.own[u])], half = Math.min(step, (y(u) - y(v)) / 2);
    const bend = (from, to, y0, y1) => (from === to ? `L ${to} ${y1}` : `C ${from} ${(y0 + y1) / 2} ${to} ${(y0 + y1) / 2} ${to} ${y1}`);
    const path = `M ${a} ${y(v)} ${bend(a, b, y(v), y(v) + half)} L ${b} ${y(u) - half} ${bend(b, c, y(u) - half, y(u))}`;
    svg.append(el("path", { d: path, class: "edge", stroke: colour(v, u), "data-edge": `${v} ${u}` }));
  }
  for (const [i, j] of arcs()) {
    const reach = room * Math.min(0.94, Math.sqrt((j - i) / N)), x0 = right - 4;
    const arc = el("path", { d: `M ${x0} ${y(i)} C ${x0 + reach * 1.3} ${y(i)} ${x0 + reach * 1.3} ${y(j)} ${x0} ${y(j)}`, class: "arc", stroke: colour(i, j), "data-arc": `${i} ${j}` },
      el("title", {}, `${POINTS[i].name} – ${POINTS[j].name}: R ${R.text(i, j)}, ${apart(i, j)}`));
    arc.addEventListener("click", () => keep(i, j));
    svg.append(arc);
  }
  POINTS.forEach((point, k) => {
    const kept = STATE.pair !== null && STATE.pair.includes(k);
    const node = el("g", { class: kept ? "node kept" : "node", tabindex: "0", role: "button", "aria-label": `${point.name}: R ${R.text(k, k)}` },
      el("title", {}, `${point.name}: R ${R.text(k, k)}`),
      el("rect", { x: 0, y: y(k) - step / 2, width: right - 6, height: step, class: "touch" }),
      el("circle", { cx: x(LANES.own[k]), cy: y(k), r: N > 40 ? 4.5 : 6, fill: colour(k, k) }),
      el("text", { x: left, y: y(k), "dominant-baseline": "central" }, point.name));
    node.addEventListener("click", () => keep(k, k));
    node.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); keep(k, k); find("dag").querySelectorAll("g.node")[k].focus(); } });
    svg.append(node);
  });
  find("dag").replaceChildren(svg, legend(SEQUENCE, by.low, by.high, by.log, `R, ${by.log ? "log" : "linear"} scale`));
}

/** Pairs that arcs join: the kept point's with all others, else those as near as is wished; the strongest on top. */
function arcs() {
  const [a, b] = STATE.pair ?? [-1, -1], reach = Number(find("reach").value), found = [];
  for (let i = 0; i < N; i++)
    for (let j = i + 1; j < N; j++) {
      const d = distance(i, j), own = a === b ? i === a || j === a : i === a && j === b;
      if (METRIC.resonance.at(i, j) > 0 && (STATE.pair === null ? d > 1 && d <= reach : own)) found.push([i, j]);
    }
  return found.sort((p, q) => METRIC.resonance.at(...p) - METRIC.resonance.at(...q));
}

function watchGraph() {
  const reach = find("reach"), say = () => { find("reach-said").textContent = reach.value; };
  reach.max = FARTHEST;
  reach.value = Math.min(N <= 8 ? FARTHEST : 2, FARTHEST);
  reach.parentElement.hidden = FARTHEST < 2;
  reach.addEventListener("input", () => { say(); drawGraph(); });
  say();
}
