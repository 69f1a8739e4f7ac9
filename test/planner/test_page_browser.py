"""The page as a browser shows it, and that it asks for nothing else."""

import random
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest
from playwright.sync_api import Browser, Locator, sync_playwright
from playwright.sync_api import Page as Tab

from sglang_hma.planner.__main__ import main
from sglang_hma.planner.page.data import Page
from sglang_hma.planner.page.html import shown, significant

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
# Without these it looks up its maker's hosts at every start.
FLAGS = [
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
]
# Resolves when every chart is as wide as the page gives it.
RESIZED = """(charts) => new Promise((done) => {
    const width = (element) => element.getBoundingClientRect().width;
    const fits = (chart) => Math.abs(width(chart) - width(chart.querySelector(".main-svg"))) < 2;
    const look = () => charts.map((id) => document.getElementById(id)).every(fits)
        ? done() : requestAnimationFrame(look);
    look();
})"""
CHARTS = ("goodput", "per-dollar", "attainment", "ttft", "tpot", "break-even", "timeline")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    lengths = [(rng.randint(1000, 8000), rng.randint(2, 200)) for _ in range(100)]
    rows = "".join(f"{i * 500},{given},{made}\n" for i, (given, made) in enumerate(lengths))
    (folder / "trace<b>.csv").write_text(f"timestamp_ms,input_length,output_length\n{rows}")
    main(
        f"compare --trace {folder}/trace<b>.csv --budget-instances 2 --seeds 2 --requests 40 "
        f"--systems colocated pd-bf16 ours --html {folder}/page.html".split()
    )
    return folder / "page.html"


@pytest.fixture(scope="module")
def data(file: Path) -> Page:
    """What the page has in it."""
    _, _, rest = file.read_text().partition('<script type="application/json" id="data">')
    return msgspec.json.decode(rest.partition("</script>")[0], type=Page)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=0)
        yield started
        started.close()


@pytest.fixture
def tab(browser: Browser, file: Path) -> Iterator[Tab]:
    """The page, drawn; nothing may go wrong in it and nothing may be asked for."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(0)
    opened = context.new_page()
    wrong: list[str] = []
    opened.on("console", lambda said: wrong.append(said.text))
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on(
        "request",
        lambda request: (
            None
            if request.url.startswith(("data:", "blob:")) or request.url.partition("#")[0] == url
            else wrong.append(request.url)
        ),
    )
    url = file.as_uri()
    opened.goto(url)
    opened.locator("html[data-drawn=all]").wait_for(state="attached")
    yield opened
    context.close()
    assert wrong == []


class References(HTMLParser):
    """Everything that the file's elements refer to, and the text of its styles."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()
        self.style = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.found += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")
        ]

    def handle_data(self, text: str) -> None:
        if self.lasttag == "style":
            self.style += text


def test_the_file_refers_to_nothing_outside(file: Path) -> None:
    references = References()
    references.feed(file.read_text())
    assert references.found and all(each.startswith("#") for each in references.found)
    assert not references.tags & {"link", "iframe", "img", "object", "embed", "base"}
    assert "url(" not in references.style and "@import" not in references.style
    assert "default-src 'none'" in file.read_text()[:2000]
    assert file.stat().st_size < 6e6


def test_tables_need_no_script(browser: Browser, file: Path, data: Page) -> None:
    context = browser.new_context(java_script_enabled=False)
    context.set_default_timeout(0)
    tab = context.new_page()
    tab.goto(file.as_uri())
    for row in data.rows:
        line = tab.locator("section tr", has=tab.locator("small", has_text=row.title)).first
        assert row.price is not None
        for text in (row.mix, f"${row.price.usd:,.0f}", significant(row.rate)):
            assert text is not None and text in line.inner_text()
        table = tab.locator(f"#rests-{row.system} tbody tr")
        assert table.count() == len(row.figures)
        assert table.locator(".assumed").count() == row.assumed > 0
    even = data.break_even
    assert even is not None and tab.locator("noscript").inner_text()
    expect_shown(tab, shown(even, even.efficiency_at, even.link_at, even.ratio_at))
    assert "trace<b>.csv" in tab.locator(".setting").inner_text()
    context.close()


def expect_shown(tab: Tab, expected: dict[str, Any]) -> None:
    for name, selector in (
        ("price", "#ratio-value"),
        ("efficiency", "#efficiency-value"),
        ("link", "#link-value"),
        ("mix", "#mix"),
    ):
        assert tab.locator(selector).inner_text() == expected[name]
    for baseline, cells in expected["baselines"].items():
        row = tab.locator(f'#break-even-table tr[data-baseline="{baseline}"]')
        for basis, texts in cells.items():
            for what, text in texts.items():
                assert row.locator(f'[data-cell="{basis} {what}"]').inner_text() == text


def drawn(tab: Tab) -> dict[str, Any]:
    """What the break-even chart shows."""
    found: dict[str, Any] = tab.evaluate("""() => {
        const chart = document.getElementById("break-even");
        const price = chart.layout.shapes.find((shape) => shape.name === "price");
        return {price: price.x0, lines: chart.data.map((each) => [each.meta, each.x, each.y])};
    }""")
    return found


def move(slider: Locator, steps: int) -> None:
    """From its beginning, with the keyboard."""
    slider.press("Home")
    for _ in range(steps):
        slider.press("ArrowRight")


def test_sliders_show_what_was_computed(tab: Tab, data: Page, seed: int) -> None:
    rng, even = random.Random(seed), data.break_even
    assert even is not None
    at = {"ratio": even.ratio_at, "efficiency": even.efficiency_at, "link": even.link_at}
    expect_shown(tab, shown(even, at["efficiency"], at["link"], at["ratio"]))
    choices = {
        "ratio": len(even.ratios),
        "efficiency": len(even.efficiencies),
        "link": len(even.links),
    }
    for name in (*choices, *rng.choices(list(choices), k=6)):
        before = tab.locator("#prices").inner_text()
        to = rng.choice([each for each in range(choices[name]) if each != at[name]])
        move(tab.locator(f"#{name}"), to)
        at[name] = to
        assert tab.locator("#prices").inner_text() != before
        expect_shown(tab, shown(even, at["efficiency"], at["link"], at["ratio"]))
        state = even.states[at["efficiency"]][at["link"]]
        chart = drawn(tab)
        assert chart["price"] == even.ratios[at["ratio"]]
        for meta, x, y in chart["lines"]:
            if meta == "crossings":
                inside = [each.crossing for each in state.lines]
                inside = [e for e in inside if even.ratios[0] <= e <= even.ratios[-1]]
                assert x == inside and y == [1] * len(inside)
            else:
                line = state.line(*meta.split(" "))
                assert (x, y) == (even.ratios, line.over if line else [])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_fits_and_is_drawn(tab: Tab, width: int, scheme: Any, tmp_path: Path) -> None:
    tab.emulate_media(color_scheme=scheme)
    tab.set_viewport_size({"width": width, "height": 900})
    tab.evaluate(RESIZED, list(CHARTS))
    for details in tab.locator("summary").all():
        details.click()
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    for chart in CHARTS:
        assert tab.locator(f"#{chart} .traces, #{chart} .trace").count() > 0, chart
    back = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    text = tab.evaluate("document.getElementById('ttft').layout.font.color")
    assert (back, text) == {
        "light": ("rgb(255, 255, 255)", "#1b2026"),
        "dark": ("rgb(21, 24, 28)", "#e4e8ec"),
    }[scheme]
    picture = tmp_path / "page.png"
    tab.screenshot(path=picture, full_page=True)
    assert picture.stat().st_size > 50_000


def test_a_link_opens_what_a_row_rests_on(tab: Tab) -> None:
    details = tab.locator("#rests-ours")
    assert details.get_attribute("open") is None
    tab.locator('a[href="#rests-ours"]').click()
    # The page learns of its new address only after the click has returned.
    tab.locator("#rests-ours[open]").wait_for()


def test_a_folder_that_is_not_there_is_refused_first(file: Path) -> None:
    with pytest.raises(SystemExit, match=r"--html is .*none/page.html; needs a file in a folder"):
        main(
            f"compare --trace {file.parent}/trace<b>.csv --budget-usd 1e5 "
            f"--html {file.parent}/none/page.html".split()
        )
