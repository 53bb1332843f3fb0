"""Tables of a report: what is a number, and that a wide one leaves the page as wide as the window."""

from pathlib import Path

from data import page
from tests.helpers.browser import browser


def test_numbers_end_at_the_right() -> None:
    for cell in ("3", "-0.5", "1,234", "12.5%", "1e-06", "2.5e+03", "30.7k", "1.29M", "-"):
        assert "td class=number" in page.table([(cell,)]), cell
    for cell in ("trainer", "1.2.3", "k", "5 s", "e"):
        assert "td class=number" not in page.table([(cell,)]), cell


def test_a_wide_table_scrolls_in_itself(tmp_path: Path) -> None:
    head = [f"trainer.some_long_key_{number}" for number in range(30)]
    file = tmp_path / "index.html"
    file.write_text(page.page("wide", "", page.table([range(30)], head)))
    with browser() as window:
        window.open(file.as_uri())
        assert window.run("return document.documentElement.scrollWidth <= window.innerWidth")
        assert window.run(
            "const box = document.querySelector('table').parentNode; return box.scrollWidth > box.clientWidth"
        )
