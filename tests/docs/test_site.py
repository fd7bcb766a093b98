"""The documentation site: built without warnings and without a network, with its reference generated from the code."""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import pytest
import typer
from pydantic import BaseModel, Field

from vlm_unlearn.attacks.base import ATTACKS
from vlm_unlearn.cli.main import app
from vlm_unlearn.evaluation import assessment
from vlm_unlearn.methods import METHODS
from vlm_unlearn.metrics.rates import rate

pytest.importorskip("mkdocs", reason="the site needs the extra docs")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def all_commands(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from all_commands(f"{path} {name}", inner)


def test_command_page_has_every_command_and_option(generate: ModuleType) -> None:
    pieces = re.split(r"^#+ (vlm-unlearn[\w -]*) \{", generate.commands(), flags=re.MULTILINE)
    sections = dict(zip((name.strip() for name in pieces[1::2]), pieces[2::2], strict=True))
    commands = dict(all_commands("vlm-unlearn", typer.main.get_command(app)))
    assert sections.keys() == commands.keys()
    for name, command in commands.items():
        options = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
        assert not [option for option in options if option not in sections[name]], name


def test_metrics_page_has_all_metrics_with_their_judges(generate: ModuleType) -> None:
    sections = dict(part.split("\n", 1) for part in generate.metrics().split("## suites/")[1:])
    assert "| `specificity` | the mean of the scores |" in sections["specificity"]
    assert "| `mmvet` | the benchmark's score | questions | `mmvet` | `llm` by `mm_vet` |" in sections["specificity"]
    published = re.search(r"^\| `asr`, published \|.*$", sections["safety_mirage"], re.MULTILINE)
    assert published is not None
    assert published[0].endswith("| `llm` by `relevance_original`, as published |")
    assert (
        "| `asr` | `complied` | questions, any answer | `unsafe` | `llm` by `four_labels` |"
        in sections["safety_mirage"]
    )


def test_examples_on_the_command_page_are_commands(generate: ModuleType) -> None:
    page = generate.commands()
    assert "```bash\nvlm-unlearn demo --out demo\n```" in page
    example = re.search(r"^vlm-unlearn data import safe-eraser dataset.*$", page, re.MULTILINE)  # wrapped in the source
    assert example is not None
    assert example[0].endswith("--out data/safe_eraser")


def test_recipe_page_has_every_key_once(generate: ModuleType) -> None:
    recipe = generate.recipe_fields()
    for key in ("learning_rate", "max_steps", "stop_when", "at_most", "target_modules", "prompt_decouple_weight"):
        assert recipe.count(f"| `{key}` |") == 1
    assert "| `learning_rate` | number above 0 | `1e-05` | Peak learning rate of AdamW. |" in recipe
    assert re.findall(r"^## (\S+)", recipe, flags=re.MULTILINE)[:4] == [
        "method",
        "defense",
        "trainable",
        "trainable.lora",
    ]


def test_method_page_has_every_method_and_its_options(generate: ModuleType) -> None:
    page = generate.methods()
    for name, method in METHODS.items():
        assert f"## {name}\n" in page
        assert method.source in page
    assert "| `beta` | number above 0 | `2.5` |" in page


def test_attack_page_has_every_attack_and_its_options(generate: ModuleType) -> None:
    page = generate.attacks()
    for name, attack in ATTACKS.built_in_items():
        assert f"## {name}\n" in page
        assert isinstance(attack, type)
        assert [key for key in attack.options_type.model_fields if f"| `{key}` |" not in page] == []
    assert "| `quality` | list of integer from 1 to 100 | `[10]` | Qualities, from 1 to 100." in page


class Example(BaseModel):
    plain: int = 3
    bounded: Annotated[float, Field(ge=0, le=1)] | None = None
    chosen: list[Literal["a", "b"]] = []
    named: dict[str, bool] = Field(default_factory=dict)
    bar: str = Field(description="left | right")


def test_types_and_bounds_of_fields_are_words(generate: ModuleType) -> None:
    rows = generate._fields(Example).splitlines()[2:]
    assert rows == [
        "| `plain` | integer | `3` |  |",
        "| `bounded` | number from 0 to 1 or null | `null` |  |",
        "| `chosen` | list of `a` or `b` | none |  |",
        "| `named` | name: true or false | none |  |",
        "| `bar` | text | required | left \\| right |",
    ]


def test_generated_pages_have_a_note_in_their_file() -> None:
    pages = [page for page in (ROOT / "docs" / "reference").rglob("*.md") if page.name != "index.md"]
    assert [page.name for page in pages if "stub here: `make docs`" not in page.read_text(encoding="utf-8")] == []


def test_numbers_page_lists_the_conclusions_and_thresholds_of_the_assessment() -> None:
    section = (
        (ROOT / "docs" / "numbers.md")
        .read_text(encoding="utf-8")
        .partition("## The assessment")[2]
        .partition("\n## ")[0]
    )
    words = " ".join(section.split())
    conclusions = assessment.KEYWORD_CONCLUSIONS
    assert [conclusion for conclusion in (*conclusions, *conclusions.values()) if conclusion not in words] == []
    assert (assessment.SAFE, assessment.HARMFUL, assessment.MAX_LOST) == (0.1, 0.1, 0.1)
    assert (assessment.BROKEN, assessment.OVER_REFUSING, assessment.USEFUL) == (0.3, 0.2, 0.7)
    highs = [rate([0.0] * count, [str(group) for group in range(count)]).high for count in (34, 35)]
    assert [high is not None and high <= assessment.SAFE for high in highs] == [False, True]
    for threshold in ("10 %", "20 % or more", "fewer than 70 %", "30 % or fewer", "35 are the fewest"):
        assert threshold in words


def test_unknown_generated_section_is_an_error(generate: ModuleType) -> None:
    with pytest.raises(KeyError, match="nonsense"):
        generate.on_page_markdown("<!-- generated: nonsense -->", page=None, config=None, files=None)


class ResourceParser(HTMLParser):
    """Collects the addresses of the resources that a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag in ("script", "img", "iframe", "source") and attributes.get("src"):
            self.addresses.append(str(attributes["src"]))
        if tag == "link" and attributes.get("rel") not in ("canonical", "next", "prev"):
            self.addresses.append(str(attributes.get("href")))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. A warning fails the build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_site_loads_no_external_resources(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        parser = ResourceParser()
        parser.feed(page.read_text(encoding="utf-8"))
        assert not [url for url in parser.addresses if re.match(r"(https?:)?//", url)], page
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_site_opens_from_disk(site: Path) -> None:
    """Every link names a file. From disk, a link to a folder would list its files."""
    for page in site.rglob("*.html"):
        for link in re.findall(r'<a [^>]*href="([^"#?]+)', page.read_text(encoding="utf-8")):
            assert page.name == "404.html" or re.match(r"[a-z]+:", link) or (page.parent / link).is_file(), (page, link)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_site_has_no_markers_and_no_links_to_sources(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert "<!-- generated:" not in text, page
        assert "stub here" not in text, page
        assert not re.search(r'href="[^"]*\.md["#]', text), page
    assert (site / "changelog.html").is_file()
    assert not (site / "generate.py").exists()


@pytest.fixture
def served(site: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_site_search_phone_width_and_color_schemes(
    served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    monkeypatch.setenv("HOME", str(tmp_path))
    requests: list[str] = []
    errors: list[str] = []
    arguments = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-sync",
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, headless=True, args=arguments)
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.on("request", lambda request: requests.append(request.url) if request.url.startswith("http") else None)
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        for path in ("index.html", "published.html", "reference/recipe.html", "reference/api/losses.html"):
            page.goto(served + path)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, path
        page.set_viewport_size({"width": 1280, "height": 900})
        page.goto(served)
        page.fill("input[name=query]", "prompt_decouple_weight")
        page.wait_for_selector(".md-search-result__link")
        assert page.locator(".md-search-result__link").count() >= 2
        dark = browser.new_page(color_scheme="dark")
        dark.goto(served)
        assert dark.get_attribute("body", "data-md-color-scheme") == "slate"
        dark.click("label[title=Light]")
        assert dark.get_attribute("body", "data-md-color-scheme") == "default"
        browser.close()
    assert not [url for url in requests if not url.startswith(served)]
    assert not errors
