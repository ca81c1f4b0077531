"""The page of a report in a browser: its figures are the report's, with the pointer, the keyboard and a screen reader."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dag_hesse as dh
from dag_hesse.estimate import METRICS
from dag_hesse.report.colour import colours, spread
from dag_hesse.report.pairs import number
from tests.page.conftest import Open
from tests.page.reports import EVIL, FACTS, long_names, made

pytestmark = pytest.mark.xdist_group("chromium")
CELLS = """return [...document.querySelectorAll(`table.map[data-metric="${arguments[0]}"] tbody tr`)].map(
    (row) => [...row.querySelectorAll("td")].map((cell) => cell.ariaLabel))"""


def find(page: Any, selector: str) -> Any:
    return page.find_element("css selector", selector)


def texts(page: Any, selector: str) -> list[str]:
    """Of elements, whether or not they are in view."""
    return page.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((x) => x.textContent)", selector
    )


def show_all_maps(page: Any) -> None:
    for box in page.find_elements("css selector", "#shown input"):
        if not box.is_selected():
            box.click()


def cell(page: Any, metric: str, i: int, j: int) -> Any:
    return find(page, f'table.map[data-metric="{metric}"] td[data-i="{i}"][data-j="{j}"]')


def click(page: Any, element: Any) -> None:
    """Out from under the bar at the top first."""
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    element.click()


def choose(page: Any, box: str, value: str) -> None:
    click(page, find(page, f'#{box} option[value="{value}"]'))


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_cell_says_what_the_report_says(opened: Open, symmetric: bool) -> None:
    report = made(7, symmetric=symmetric)
    page = opened(report)
    show_all_maps(page)
    for metric in METRICS:
        error = report.stderr[metric].astype(np.float32).astype(float)
        expected = [
            [
                number(report.values[metric][i, j], error[i, j], how) + ("" if how == "zero" else f", {how}")
                for j, how in enumerate(row)
            ]
            for i, row in enumerate(report.method[metric])
        ]
        assert page.execute_script(CELLS, metric) == expected
        bits = page.execute_script(
            "const m = METRIC[arguments[0]]; return POINTS.map((_, i) => POINTS.map((_, j) => String(m.at(i, j))))",
            metric,
        )
        assert np.array_equal(np.array(bits, dtype=float), report.values[metric], equal_nan=True)


def test_numbers_are_written_as_python_writes_them(opened: Open) -> None:
    random = np.random.default_rng(0)
    numbers = [
        *random.lognormal(0.0, 8.0, 500), *(k / 8 for k in range(1, 300)), 1e-3, 9.995e-4, 999.5, 1000.0, 9999.0, 1e4,
        2.5e-7, 1e100, 1.125, 1.375, 0.0, 1e22,
    ]  # fmt: skip
    cells = [
        [x, x * share, how]
        for x in numbers
        for share, how in ((0.0, "e"), (0.125, "p"), (0.375, "p"), (0.004, "p"), (0.045, "z"))
    ]
    written = page_numbers(opened, cells)
    assert written == [number(x, off, "zero" if how == "z" else "probes") for x, off, how in cells]


def page_numbers(opened: Open, cells: list[list[Any]]) -> list[str]:
    return opened(made(3)).execute_script("return arguments[0].map((cell) => number(...cell))", cells)


def test_pointing_at_a_cell_shows_its_figures_and_lights_it_in_every_map(opened: Open) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    report = made(5)
    page = opened(report)
    ActionChains(page).move_to_element(cell(page, "coupling", 1, 3)).perform()
    tip = find(page, "#tip")
    assert tip.is_displayed()
    pair = report[1, 3]
    rows = {row.split()[0]: row for row in tip.text.splitlines()[2:]}
    assert tip.text.splitlines()[:2] == [pair.v, pair.w]
    assert pair.coupling.method in rows["C"] and f"{pair.coupling.value:.3g}" in rows["C"]
    assert ("±" in rows["C"]) == (pair.coupling.stderr > 0)
    assert len(page.find_elements("css selector", "td.lit")) == 4
    assert texts(page, "table.map[data-metric=coupling] th.lit") == texts(
        page, 'table.map[data-metric=coupling] th[data-j="3"], table.map[data-metric=coupling] th[data-i="1"]'
    )
    ActionChains(page).move_to_element(find(page, "h1")).perform()
    assert not tip.is_displayed()


def test_the_keyboard_alone(opened: Open) -> None:
    from selenium.webdriver.common.keys import Keys

    page = opened(made(5))
    find(page, "#maps").send_keys(Keys.TAB)  # into the first map, at its one stop
    for key in (
        Keys.ARROW_DOWN,
        Keys.ARROW_RIGHT,
        Keys.ARROW_RIGHT,
        Keys.ARROW_UP,
        Keys.ARROW_DOWN,
        Keys.END,
        Keys.ARROW_LEFT,
    ):
        page.switch_to.active_element.send_keys(key)
    active = page.switch_to.active_element
    assert (active.get_attribute("data-i"), active.get_attribute("data-j")) == ("1", "3")
    active.send_keys(Keys.ENTER)
    assert page.execute_script("return STATE.pair") == [1, 3]
    assert len(page.find_elements("css selector", 'td[aria-selected="true"]')) == 8  # both triangles of four maps
    page.switch_to.active_element.send_keys(Keys.TAB)
    assert (
        page.switch_to.active_element.find_element("xpath", "ancestor::table").get_attribute("data-metric")
        == "coupling"
    )


def test_a_kept_pair_is_shown_everywhere(opened: Open) -> None:
    report = made(5)
    page = opened(report)
    i, j = np.argwhere(np.triu(report.resonance, 1) > 0)[0].tolist()
    row = find(page, f'tr[data-pair="{i} {j}"]')
    click(page, row)
    pair = report[i, j]
    side = find(page, "#pair").text
    for word in (pair.v, pair.w, "2×3 = 6", f"distance {pair.distance}", f"≤ {pair.rank_bound}", "report.block("):
        assert word in side
    assert page.execute_script("return document.querySelectorAll('circle.dot.kept').length") == 3
    assert page.execute_script("return document.querySelectorAll('.arc').length") == 1
    assert row.get_attribute("aria-selected") == "true"
    click(page, find(page, "#pair .quiet"))
    assert page.execute_script("return STATE.pair") is None


def test_sorting_and_filtering(opened: Open) -> None:
    report = made(16)
    page = opened(report)
    click(page, find(page, "#more"))
    order = [tuple(map(int, key.split())) for key in page.execute_script("return [...document.querySelectorAll('.pairs tbody tr')].map((r) => r.dataset.pair)")]  # fmt: skip
    assert [report.resonance[p] for p in order] == sorted(report.resonance[np.triu_indices(16)], reverse=True)
    click(page, find(page, ".pairs th:nth-child(6) button"))  # stable rank: undefined ones come last
    column = texts(page, ".pairs tbody td:nth-child(6)")
    assert "-" in column and set(column[column.index("-") :]) == {"-"}
    find(page, "#filter").send_keys("encoder.layers.*.linear?.weight")
    assert find(page, "#count").text == "8 of 16 points"
    assert len(page.find_elements("css selector", "table.map[data-metric=resonance] tbody tr")) == 8
    assert len(page.find_elements("css selector", ".pairs tbody tr")) == 36
    choose(page, "order", "strength")
    rows = page.execute_script("return [...document.querySelectorAll('table.map[data-metric=resonance] tbody th')].map((x) => +x.dataset.i)")  # fmt: skip
    kept = [k for k, name in enumerate(report.names) if "linear" in name]
    assert rows == sorted(kept, key=lambda k: -report.resonance[k, k])
    find(page, "#filter").send_keys("nothing")
    assert "No point" in find(page, "#grid").text


def test_the_graph_has_the_points_and_an_edge_at_every_distance_of_one(opened: Open) -> None:
    report = made(9)
    page = opened(report)
    assert texts(page, ".node text") == list(report.names)
    edges = page.execute_script("return [...document.querySelectorAll('.edge')].map((x) => x.dataset.edge)")
    upper = np.triu(report.distance == 1)
    assert sorted(edges) == sorted(f"{i} {j}" for i, j in zip(*np.nonzero(upper), strict=True))
    page.execute_script("const r = find('reach'); r.value = 3; r.dispatchEvent(new Event('input'))")
    arcs = page.execute_script("return document.querySelectorAll('.arc').length")
    assert arcs == int((np.triu((report.distance > 1) & (report.distance <= 3)) & (report.resonance > 0)).sum())


def test_decay_has_the_fits_of_the_theory(opened: Open) -> None:
    report = made(9)
    page = opened(report)
    for metric in ("resonance", "coupling", "stable_rank"):
        fit = dh.theory.decay_fit(report, metric)
        said = find(page, f'[data-curve="{metric}"] .said').text
        assert said.startswith(f"slope {number(fit.slope, 0, 'exact')} [{number(fit.interval[0], 0, 'exact')}, ")
        dots = page.execute_script(f"return document.querySelectorAll('[data-curve={metric}] .dot').length")
        assert dots == int((report.values[metric][np.triu_indices(9)] > 0).sum())


def test_fits_are_drawn_where_their_line_is(opened: Open) -> None:
    report = made(9)
    page, fit = opened(report), dh.theory.decay_fit(report)
    heights = "return [...document.querySelectorAll('[data-curve=resonance] .mean')].map((x) => +x.getAttribute('cy'))"
    rings = np.array(page.execute_script(heights))
    slope, shift = np.polyfit(np.log(fit.mean), rings, 1)  # from logarithms to pixels
    assert np.allclose(rings, slope * np.log(fit.mean) + shift)
    path = page.execute_script("return document.querySelector('[data-curve=resonance] .fit').getAttribute('d')")
    line = [float(point.split()[1]) for point in path.removeprefix("M ").split(" L ")]
    assert np.allclose(line, slope * (fit.intercept + fit.slope * fit.distance) + shift)


def test_cells_have_the_colours_of_their_values_and_a_scale_that_says_so(opened: Open) -> None:
    report = made(6)
    report.values["stable_rank"][:] = np.where(np.isnan(report.stable_rank), np.nan, 1.0 + report.distance)
    page = opened(report)
    for metric in ("resonance", "coupling", "stable_rank"):
        values = report.values[metric].ravel()
        drawn = page.execute_script(
            f"return [...document.querySelectorAll('[data-metric={metric}].map tbody td')].map((x) => x.style.background)"
        )
        for text, hexes in zip(drawn, colours(values), strict=True):
            expected = "" if hexes is None else f"rgb({', '.join(str(int(hexes[k : k + 2], 16)) for k in (1, 3, 5))})"
            shades = [list(map(int, re.findall(r"\d+", each))) for each in (text, expected)]
            assert len(shades[0]) == len(shades[1])
            assert all(abs(x - y) <= 1 for x, y in zip(*shades, strict=True))
        kind = texts(page, f"figure:has([data-metric={metric}]) .kind")
        assert kind == ["log scale" if spread(values)[2] else "linear scale"]


def test_a_real_report(opened: Open) -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Linear(4, 4), nn.Tanh())]
    model, batch = nn.Sequential(*layers, nn.Linear(4, 2)), (torch.randn(5, 4), torch.tensor([0, 1, 0, 1, 1]))
    report = dh.analyze(model, batch, points=["1", "3", "5"], seed=3)
    page = opened(report, spectra=dh.theory.block_spectra(model, batch))
    assert texts(page, "#proved tbody tr") == ["HT3 of 6the points meet in no op of the model that has a second derivative; elsewhere there are tanh ×2"]  # fmt: skip
    assert find(page, "#call").text == "dag_hesse.analyze(model, batch, points=['1', '3', '5'], seed=3)"
    assert eval(find(page, "#call").text, {"dag_hesse": dh, "model": model, "batch": batch}).resonance.tolist() == report.resonance.tolist()  # fmt: skip
    stages = dict(zip(texts(page, "#times tbody th"), texts(page, "#times tbody td:last-child"), strict=True))
    assert stages["capture"] == f"{number(report.facts['seconds']['capture'], 0, 'exact')} s"
    assert "total" not in stages
    facts = dict(zip(texts(page, "#facts dt"), texts(page, "#facts dd"), strict=True))
    assert facts["dtype"] == "float32" and facts["seed"] == "3"
    assert len(texts(page, "#densities tbody tr")) == 8  # blocks
    assert texts(page, "#densities tbody tr:first-child td:last-child") == ["all eigenvalues"]


def test_names_are_text_whatever_they_hold(opened: Open) -> None:
    report = made(3, names=[EVIL, "<!--data-->", "</script><img src=x onerror=alert(1)>"])
    page = opened(report)
    assert page.title == "Curvature of Encoder"
    assert texts(page, ".node text") == list(report.names)
    assert page.find_elements("css selector", "img") == []
    click(page, find(page, 'tr[data-pair="0 2"]'))
    assert EVIL in find(page, "#pair").text


def test_two_reports_are_compared(opened: Open) -> None:
    before, after = made(5), made(6, seed=1)
    page = opened(before, against=after)
    show_all_maps(page)
    choose(page, "view", "change")
    found, labels = before.compare(after), page.execute_script(CELLS, "gn_norm")
    for i in range(5):
        for j in range(5):
            old, new = (number(each["gn_norm"][i, j], 0, "exact") for each in (found.before, found.after))
            score = found.score["gn_norm"][i, j]
            said = f"{'−' if score < 0 else '+'}{abs(score):.1f} σ" if np.isfinite(score) else "both exact"
            assert labels[i][j] == f"{old} → {new} ({said})"
    assert "Compared with" in find(page, "#lines").text
    assert after.names[5] in find(page, "#lines").text  # in one alone
    page = opened(after, against=before)
    choose(page, "view", "change")
    assert {row[5] for row in page.execute_script(CELLS, "resonance")} == {"in this report alone"}


@pytest.mark.parametrize("count", [5, 16, 64])
def test_long_names_are_legible(opened: Open, count: int) -> None:
    report = made(count)
    page = opened(report)
    heads = page.execute_script("""return [...document.querySelectorAll("table.map[data-metric=resonance] th")].map((x) => {
        const box = x.getBoundingClientRect(), style = getComputedStyle(x);
        return {text: x.textContent, size: parseFloat(style.fontSize), cut: x.scrollWidth > x.clientWidth + 1,
                row: x.scope === "row", side: x.scope === "row" ? box.height : box.width, line: parseFloat(style.lineHeight)}})""")
    assert len(heads) == 2 * count
    for scope in (True, False):
        assert len({head["text"] for head in heads if head["row"] is scope}) == count
    assert all(head["size"] >= 9 and not head["cut"] and head["side"] >= head["size"] for head in heads)
    assert texts(page, ".node text") == long_names(count)
    width = page.execute_script("return document.documentElement.scrollWidth - innerWidth")
    assert width <= 0  # what is wide scrolls by itself


def test_a_page_of_64_points_is_small_and_compared_still(tmp_path: Any) -> None:
    made(64).to_html(tmp_path / "a.html", against=made(64, seed=1))
    assert (tmp_path / "a.html").stat().st_size <= 500_000


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(opened: Open, scheme: str) -> None:
    page = opened(made(5))
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    selectors = ["h1", ".hint", "#pair p", ".map th", ".map td.dark", ".map td.bright", ".pairs td", "dt", "figcaption"]
    contrasts = page.execute_script(
        """const light = (text) => { const c = text.match(/[\\d.]+/g).slice(0, 3).map((x) => x / 255).map((x) => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
             return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]; };
           const ground = (x) => { const c = getComputedStyle(x).backgroundColor; return c.endsWith(", 0)") && x.parentElement ? ground(x.parentElement) : c; };
           return Object.fromEntries(arguments[0].flatMap((s) => [...document.querySelectorAll(s)].map((x) => {
             const [a, b] = [light(getComputedStyle(x).color), light(ground(x))].sort((p, q) => q - p); return [s, (a + 0.05) / (b + 0.05)]; })
             .sort((p, q) => q[1] - p[1]).slice(-1)))""",
        selectors,
    )
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert set(contrasts) == set(selectors)
    assert {name: value for name, value in contrasts.items() if value < 4.5} == {}


def test_a_screen_reader_finds_grids_heads_and_figures(opened: Open) -> None:
    page = opened(made(8))
    nodes = page.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles: dict[str, list[str]] = {}
    for node in nodes:
        if not node["ignored"]:
            roles.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    assert {"R, ‖H‖_F", "C, coupling"} <= set(roles["grid"])
    cells = [name for name in roles["gridcell"] if name]
    assert len(cells) >= 4 * 64
    assert {"Maps", "Points", "Pairs", "Facts", "Time"} <= set(roles["heading"])
    assert all(name for role in ("button", "checkbox", "combobox", "searchbox", "slider") for name in roles[role])


def test_a_zero_says_why(opened: Open) -> None:
    report = made(5)
    i, j = np.argwhere(np.triu(report.method["resonance"] == "zero"))[0].tolist()
    page = opened(report)
    click(page, cell(page, "resonance", i, j))
    assert "H = 0: the points meet in no op of model or loss that has a second derivative." in find(page, "#pair").text
    assert "zero" in cell(page, "resonance", i, j).get_attribute("class")
    proved = texts(page, "#proved tbody tr")
    assert proved[0].startswith(f"H{int((report.method['resonance'][np.triu_indices(5)] == 'zero').sum())} of 15")


def test_without_facts_of_newer_versions(opened: Open) -> None:
    facts = {key: value for key, value in FACTS.items() if key not in ("curved ops", "call")}
    report = made(3)
    object.__setattr__(report, "facts", facts)
    page = opened(report)
    assert not find(page, "#again").is_displayed()
