// Controls, and the first drawing.

function redraw() {
  STATE.order = arrange(find("filter").value.trim(), find("order").value);
  const n = STATE.order.length;
  find("count").textContent = n === N ? `${N} ${N === 1 ? "point" : "points"}` : `${n} of ${N} points`;
  drawMaps();
  drawCurves();
  drawRows();
}

function watchTools() {
  for (const m of METRICS) {
    const box = el("input", { type: "checkbox", value: m.name, checked: STATE.maps.has(m.name) ? "" : null });
    box.addEventListener("change", () => { STATE.maps[box.checked ? "add" : "delete"](m.name); drawMaps(); });
    find("shown").append(el("label", { title: m.title }, box, ` ${m.symbol}`));
  }
  let soon = 0;
  find("filter").addEventListener("input", () => {
    clearTimeout(soon);
    if (N > 30) soon = setTimeout(redraw, 150); // once a word is typed
    else redraw();
  });
  find("order").addEventListener("change", redraw);
  find("view-label").hidden = CHANGE === null;
  find("view").addEventListener("change", () => { STATE.view = find("view").value; drawMaps(); drawPair(); });
  find("more").addEventListener("click", () => { STATE.all = true; drawRows(); });
  find("tools").addEventListener("submit", (event) => event.preventDefault());
}

function compared() {
  if (DATA.against === null) return;
  const { missing, lines } = DATA.against;
  find("lines").append(el("p", { class: "other" }, el("strong", {}, "Compared with "), lines.join("; ")));
  if (missing.length) find("lines").append(el("p", {}, `In one of the reports alone: ${missing.join(", ")}`));
}

watchTools();
watchMaps();
watchGraph();
compared();
drawPair();
drawGraph();
drawSpectra();
drawProved();
drawFacts();
redraw();
