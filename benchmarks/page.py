"""Tables that a benchmark writes into a page, each between its own marks."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main(sections: Mapping[str, Callable[[], str]], description: str | None) -> None:
    """Run the named sections, or all; print each table, and put it into the page of --write."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(sections)}; none: all")
    parser.add_argument("--write", type=Path, help="page whose marked tables are replaced")
    given = parser.parse_args()
    if unknown := set(given.sections) - sections.keys():
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(sections)}")
    for name in given.sections or sections:
        text = sections[name]()
        print(f"\n## {name}\n\n{text}\n", flush=True)
        if given.write:
            write(given.write, name, text)


def write(page: Path, name: str, text: str) -> None:
    """Replace what stands between <!-- name --> and <!-- /name -->; ValueError without them."""
    before = page.read_text()
    marked = f"<!-- {name} -->\n\n{text}\n\n<!-- /{name} -->"
    after, count = re.subn(
        f"<!-- {name} -->.*?<!-- /{name} -->", lambda _: marked, before, flags=re.S
    )
    if count != 1:
        raise ValueError(f"{page}: the marks of {name} stand {count} times in it")
    page.write_text(after)
