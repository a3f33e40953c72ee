"""A web page that classifies a pasted text or an uploaded file, and shows scores, chunks and evidence.

    python -m scripts.app --model outputs/run

Also the app.py of a Space, beside the modules of `data` that it imports: `scripts.push_to_hub --space ORG/NAME`. Needs the
extra `app`, and `files` for PDF, DOCX and subtitles. Texts are not kept: an uploaded file is deleted when it has been read.
"""

import argparse
import contextlib
import functools
import html
import importlib.util
import os
import re
import sys
import tempfile
import threading
import zipfile
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Pipeline, pipeline

from data.demo_corpus import write_story
from data.document_files import DOCUMENT_SUFFIXES, Section, read_document_file

MODEL = ""  # in a Space: the model's id, which the variable MODEL_ID of the Space overrides
MAX_UPLOAD_MB, MAX_CHARACTERS, REVIEW_BELOW, REVIEW_MARGIN = 20, 1_000_000, 0.7, 0.2
ENDPOINT_KEYS = ("label", "labels", "scores", "num_chunks", "truncated", "evidence")
MOST_BARS = 20
UNPACKED = 10  # an EPUB, DOCX or ODT may unpack to so many times the upload limit
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
STORIES = {"Mature": (12, 0), "Teen": (8, 4), "General": (20, 2)}  # examples: number of chunks, seed
CSS = """
.gradio-container { max-width: 68rem !important; margin: 0 auto !important; width: 100%; }
.gradio-container .html-container { padding: 0; } .gradio-container .app { max-width: none !important; } @media (max-width: 40rem) { .gradio-container .app { padding: 1rem; } }
.page { --card: #fff; --ink: #1f2328; --soft: #57606a; --line: #dcd9d2; --link: #0b5cad; --bar: #2f7fbf; --for: #e8912d;
  --against: #5ba3d8; --middle: #f1efe9; --warn: #fff3d1; --warn-line: #b98900; color: var(--ink); font-size: 1rem; line-height: 1.55; }
.dark { color-scheme: dark; }
.dark .page { --card: #1d2024; --ink: #e8e9eb; --soft: #a7afb9; --line: #3a3f46; --link: #7ab7f5; --bar: #4b97d6; --for: #985208;
  --against: #215f94; --middle: #2b2f34; --warn: #3a2f10; --warn-line: #d9a93a; }
.page * { color: inherit; } .page p a { color: var(--link) !important; margin: 0; padding: 0; } .page :focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.page h1 { font-size: 1.7rem; margin: .5rem 0; } .page h2 { font-size: 1.15rem; margin: 1.6rem 0 .5rem; } .page p { margin: .4rem 0; }
.page .soft, .page h3, .page .soft * { color: var(--soft); } .page h3 { font-size: .8rem; margin: 0 0 .3rem; }
.page .label { font-size: 1.9rem; line-height: 1.2; margin: .5rem 0 0; overflow-wrap: anywhere; }
.page .advice { background: var(--warn); border-left: .35rem solid var(--warn-line); padding: .7rem 1rem; border-radius: 4px; }
.page ul, .page ol { list-style: none; padding: 0; margin: .5rem 0; } .page li { margin: 0; padding: 0; }
.scores { display: grid; grid-template-columns: minmax(0, max-content) 1fr max-content; gap: .4rem 1rem; align-items: center; }
.scores li { display: contents; } .scores span { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.scores .meter { position: relative; height: .8rem; background: var(--middle); border-radius: 4px; overflow: hidden; } .scores i { display: block; height: 100%; background: var(--bar); }
.meter b { position: absolute; top: 0; bottom: 0; width: 2px; margin-left: -1px; background: var(--ink); } .scores small { color: var(--soft); white-space: nowrap; }
@media (max-width: 40rem) { .scores:has(b) { display: block; } .scores:has(b) li { display: grid; grid-template-columns: minmax(0, 1fr) max-content; gap: .1rem 1rem; padding-bottom: .5rem !important; }
  .scores:has(b) .meter { grid-area: 2 / 1 / 3 / 3; } }
.scores { max-height: 28rem; overflow-y: auto; } .page .listed { font-size: 1.3rem; }
.choice { border: 0; margin: .5rem 0; padding: 0; display: flex; flex-wrap: wrap; gap: .4rem; min-width: 0; } .choice legend { padding: 0; margin: 0 0 .3rem; color: var(--soft); }
.choice label { position: relative; border: 1px solid var(--line); border-radius: 1rem; padding: .1rem .8rem; cursor: pointer; overflow-wrap: anywhere; }
.choice input { position: absolute; opacity: 0; pointer-events: none; } .choice label:has(:checked) { background: var(--link); border-color: var(--link); color: var(--card); }
.choice label:has(:focus-visible) { outline: 3px solid var(--link); outline-offset: 2px; } .of { display: none; }
.strip { display: flex; flex-wrap: wrap; gap: 4px; max-height: 13rem; overflow-y: auto; padding: 3px !important; }
.page .strip a { display: block; width: 2.7rem; padding: .15rem 0; border: 1px solid var(--line); border-radius: 4px; text-align: center;
  text-decoration: none; color: var(--ink); line-height: 1.2; font-size: .85rem; } .strip small { display: block; font-size: .7rem; }
.page .many a { width: 1.65rem; padding: .3rem 0; font-size: .65rem; } .many small { display: none !important; }
.page .strip a:hover { border-color: var(--ink); } .supports { --hue: var(--for); } .opposes { --hue: var(--against); }
.strip a { background: color-mix(in oklab, var(--hue, var(--middle)) var(--strength, 0%), var(--middle)); }
.scale { display: inline-block; width: 7rem; height: .8rem; border-radius: 3px; vertical-align: middle; margin: 0 .5rem;
  background: linear-gradient(in oklab 90deg, var(--against), var(--middle), var(--for)); }
.box { max-height: 75vh; overflow-y: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 0 1rem 1rem; }
.box > div { --now: var(--of-0, 0%); padding-top: .8rem; scroll-margin: .5rem; content-visibility: auto; contain-intrinsic-size: auto 9rem; }
.box > :target { outline: 2px solid var(--link); outline-offset: -1px; border-radius: 6px; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; padding: .4rem .7rem; border-radius: 6px;
  background: color-mix(in oklab, var(--for) calc(max(0%, var(--now, 0%)) * .5), color-mix(in oklab, var(--against) calc(max(0%, -1 * var(--now, 0%)) * .5), var(--card))); }
.unread .text { color: var(--soft); background: repeating-linear-gradient(45deg, var(--line) 0 3px, var(--card) 3px 8px); background-size: 8px 100%; background-repeat: no-repeat; padding-left: 1.2rem; }
.page mark { background: none; font-weight: var(--weight, 600); text-decoration: var(--under, underline 2px); text-underline-offset: 3px; }
.several mark { --weight: normal; --under: none; }
"""


def check_text(text: str, max_characters: int) -> str:
    """Raises ValueError if there is no text, too much of it, or something else than text."""
    if not text.strip():
        raise ValueError("There is no text: paste one, or drop a file.")
    if len(text) > max_characters:
        raise ValueError(f"The text has {len(text):,} characters, and this page takes up to {max_characters:,}.")
    if len(controls := CONTROL.findall(text)) > len(text) / 100:
        raise ValueError(
            f"This is not a text: {len(controls):,} of its {len(text):,} characters are control characters. Paste the text "
            "itself, or upload the file that it is in."
        )
    return text


def read_upload(path: Path, max_bytes: int) -> tuple[str, list[Section]]:
    """Text and pages of an uploaded file, which is deleted."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if sum(part.file_size for part in archive.infolist()) > UNPACKED * max_bytes:
                    raise ValueError(f"{path.name}: too large when it is unpacked.")
        return read_document_file(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path.name} is no longer there: upload it again.") from error
    except ValueError as error:
        # Without the server's folder, and without advice for the command line.
        message = str(error).replace(str(path), path.name)
        raise ValueError(re.sub(r"[:.] [^:.]*--encoding.*", ". Save it as UTF-8.", message)) from error
    finally:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            path.parent.rmdir()


@contextlib.contextmanager
def counting_chunks(model: Any, report: Callable[[tuple[int, int]], Any]) -> Iterator[None]:
    """Report the number of chunks encoded so far, and of all, while the model runs."""
    counts = [0, 0]

    def begin(_: Any, positional: Any, given: dict[str, Any]) -> None:
        counts[1] += len(given["input_ids"])

    def advance(_: Any, positional: Any, given: dict[str, Any], output: Any) -> None:
        counts[0] = min(counts[0] + len(given["input_ids"]), counts[1])
        report((counts[0], counts[1]))

    hooks = [
        model.register_forward_pre_hook(begin, with_kwargs=True),
        model.encoder.register_forward_hook(advance, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# ---- The result as HTML: everything that is not written here is escaped ----------------------------------------------------


def render_result(
    result: dict[str, Any],
    text: str,
    sections: list[Section],
    name: str,
    config: Any,
    review_below: float,
    review_margin: float = REVIEW_MARGIN,
) -> str:
    thresholds = thresholds_of(result, config)
    result = with_labels(result)
    chunks, explained = result["chunks"], list(result["chunks"][0]["scores"])
    names = [html.escape(label) for label in explained]
    links = [
        ", ".join(
            f'<a href="#chunk-{number}">chunk {number}</a>'
            for found in result["evidence"]
            for number, chunk in enumerate(chunks, 1)
            if found["label"] == label and chunk["start"] <= found["start"] < found["end"] <= chunk["end"]
        )
        for label in explained
    ]
    pieces = "".join(render_text(result, text, sections))
    return f"""<div class="page"><section aria-label="Result">
<p class="label{" listed" * (len(result["labels"]) > 3)}" role="status"><strong>{html.escape(", ".join(result["labels"])) or "None of the labels"}</strong></p>
<p class="soft">{html.escape(name)}: {len(text):,} characters, {result["num_chunks"]:,} {"chunk" if result["num_chunks"] == 1 else "chunks"}</p>
{render_advice(result, config, thresholds, review_below, review_margin)}
{render_scores(result, config, thresholds)}
<h2>Chunks</h2>
{render_choice(names)}
<p class="soft">{"" if result["labels"] else f"No score reaches its threshold; that of {names[0]} is the highest. "}What each chunk contributes to {of_chosen(names)}: how much lower its log-odds are without the chunk. Choose one to see its text.</p>
<p class="soft" aria-hidden="true">against<span class="scale"></span>for</p>
{of_chosen([render_strip(chunks, label) for label in explained], "div")}
<h2>Text</h2>
<p class="soft">Evidence, strongest first: {of_chosen(links)}</p>
<div class="box{" several" * (len(explained) > 1)}" tabindex="0" role="region" aria-label="Text">{pieces}</div>
</section></div>"""


def thresholds_of(result: dict[str, Any], config: Any) -> dict[str, float]:
    """The score from which a document has each label; none if it has one label."""
    if "labels" not in result:
        return {}
    return dict(zip(result["scores"], config.thresholds or [0.5] * len(result["scores"]), strict=True))


def with_labels(result: dict[str, Any]) -> dict[str, Any]:
    """The result of one label in the form of several."""
    label = result["label"]
    return {
        "labels": [label],
        **result,
        "chunks": [{"scores": {label: chunk["score"]}, **chunk} for chunk in result["chunks"]],
        "evidence": [{"label": label, **found} for found in result["evidence"]],
    }


def of_chosen(parts: list[str], tag: str = "span") -> str:
    """HTML for each explained label, of which that of the chosen label is shown."""
    if len(parts) == 1:
        return parts[0]
    return "".join(f'<{tag} class="of of-{k}">{part}</{tag}>' for k, part in enumerate(parts))


def render_choice(names: list[str]) -> str:
    """Buttons that choose one of several explained labels, without JavaScript."""
    if len(names) == 1:
        return ""
    buttons, rules = "", ""
    for k, name in enumerate(names):
        buttons += f'<label><input type="radio" name="of" id="of-{k}"{" checked" * (k == 0)}>{name}</label>'
        chosen = f".page:has(#of-{k}:checked)"
        rules += f"{chosen} .of-{k} {{ display: revert; }} {chosen} .box > div {{ --now: var(--of-{k}, 0%); }} "
        rules += f"{chosen} mark.for-{k} {{ --weight: 600; --under: underline 2px; }}\n"
    return (
        f'<style>{rules}</style><fieldset class="choice"><legend>Show the contributions to</legend>{buttons}</fieldset>'
    )


def render_scores(result: dict[str, Any], config: Any, thresholds: dict[str, float]) -> str:
    """A bar for each label; with thresholds, each is marked, and of many labels the highest scores and the document's labels
    are shown, the highest first."""
    scores, rows = result["scores"], ""
    order, calibrated = list(scores), config.temperature
    if thresholds:
        order, calibrated = sorted(scores, key=lambda name: -scores[name]), config.label_calibration
        shown = {*order[:MOST_BARS], *result["labels"]}
        order = [name for name in order if name in shown]
    for name in order:
        label, mark, note = html.escape(name), "", ""
        if name in thresholds:
            percent = 100 * thresholds[name]
            mark = f"<b style='left: {min(max(percent, 0.5), 99.5):.1f}%'></b>"
            note = f" <small>threshold {percent:.1f} %</small>"
            label = f"<strong>{label}</strong>" if name in result["labels"] else label
        bar = f"<i style='width: {100 * scores[name]:.1f}%'></i>"
        rows += f"<li><span>{label}</span><span class='meter'>{bar}{mark}</span><span>{100 * scores[name]:.1f} %{note}</span></li>"
    if rest := len(scores) - len(order):
        rows += f"<li>and {rest:,} more</li>"
    return f'<ul class="scores" aria-label="{"Calibrated scores" if calibrated else "Scores"}">{rows}</ul>'


def strengths(chunks: list[dict[str, Any]], label: str) -> list[float]:
    """The chunks' contributions to a label, in percent of the strongest; negative: against it."""
    strongest = max(abs(chunk["scores"][label]) for chunk in chunks) or 1.0
    return [100 * chunk["scores"][label] / strongest for chunk in chunks]


def render_strip(chunks: list[dict[str, Any]], label: str) -> str:
    links = ""
    for i, (chunk, strength) in enumerate(zip(chunks, strengths(chunks, label), strict=True), 1):
        score = chunk["scores"][label]
        color = f'class="{"supports" if score > 0 else "opposes"}" style="--strength: {abs(strength):.0f}%"'
        links += f'<li><a href="#chunk-{i}" {color} aria-label="Chunk {i}, {score:+.2f}">{i}<small>{_signed(score)}</small></a></li>'
    return f'<ol class="strip{" many" * (len(chunks) > 60)}">{links}</ol>'


def _signed(score: float) -> str:
    return "0.0" if abs(score) < 0.05 else f"{score:+.1f}".replace("-", "−")


def render_advice(
    result: dict[str, Any], config: Any, thresholds: dict[str, float], review_below: float, review_margin: float
) -> str:
    """Whether a person should look at the text, and why."""
    if thresholds:
        sure, reasons = "No score is near its threshold", reasons_of_several(result, config, thresholds, review_margin)
    else:
        sure, reasons = (
            f"The score is at least {100 * review_below:.0f} %",
            reasons_of_one(result, config, review_below),
        )
    if result["truncated"]:
        reasons.append(f"The text is longer than the {len(result['chunks']):,} chunks that the model reads of one.")
    if not reasons:
        return f'<p class="soft">{sure}: no check by a person is advised.</p>'
    return f'<p class="advice"><strong>A person should check this.</strong> {html.escape(" ".join(reasons))}</p>'


def reasons_of_one(result: dict[str, Any], config: Any, review_below: float) -> list[str]:
    label, scores = result["label"], result["scores"]
    score, best = scores[label], max(scores, key=scores.__getitem__)
    reasons = []
    if best != label:
        reasons.append(f"{best} is more probable: class biases of the model decide for {label}.")
    if score < review_below:
        others = f"about {100 * (1 - score):.0f} of 100 texts with such a score have another label"
        calibrated = (
            f"the scores are calibrated, so {others}" if config.temperature else "the scores are not calibrated"
        )
        reasons.append(f"The score of {label} is below {100 * review_below:.0f} %; {calibrated}.")
    return reasons


def reasons_of_several(
    result: dict[str, Any], config: Any, thresholds: dict[str, float], review_margin: float
) -> list[str]:
    """Which scores are near their thresholds, the nearest first: `review_margin` is a share of the way from the threshold to 0 or 1."""
    near = []
    for name, score in sorted(result["scores"].items(), key=lambda item: abs(item[1] - thresholds[item[0]])):
        threshold = thresholds[name]
        if abs(score - threshold) < review_margin * (threshold if score < threshold else 1 - threshold):
            near.append(f"{name} ({100 * score:.1f} %, threshold {100 * threshold:.1f} %)")
    if not near:
        return []
    listed = ", ".join(near[:5]) + f" and {len(near) - 5} more" * (len(near) > 5)
    return [f"Near the threshold: {listed}{'' if config.label_calibration else '; the scores are not calibrated'}."]


def render_text(result: dict[str, Any], text: str, sections: list[Section]) -> Iterator[str]:
    """The whole text in pieces: chunks, each from where the one before it ends, and what was not encoded."""
    chunks, starts = result["chunks"], [section.start for section in sections]
    explained = list(chunks[0]["scores"])
    evidence = [[found for found in result["evidence"] if found["label"] == label] for label in explained]
    strength_CE = list(zip(*(strengths(chunks, label) for label in explained), strict=True))
    cuts = {0, len(text), *(place for found in result["evidence"] for place in (found["start"], found["end"]))}

    def piece(attributes: str, facts: list[str], start: int, end: int) -> str:
        parts = ""
        for a, b in pairwise(sorted({start, end, *(cut for cut in cuts if start < cut < end)})):
            part = html.escape(text[a:b])
            of = [k for k, spans in enumerate(evidence) if any(found["start"] <= a < found["end"] for found in spans)]
            names = f' class="{" ".join(f"for-{k}" for k in of)}"' if len(explained) > 1 else ""
            parts += f"<mark{names}>{part}</mark>" if of else part
        if sections:
            facts.append(html.escape(sections[max(0, bisect_right(starts, start) - 1)].name))
        return f'<div {attributes}><h3>{" · ".join(facts)}</h3><div class="text" dir="auto">{parts}</div></div>'

    def contribution(chunk: dict[str, Any], k: int) -> str:
        ranks = (
            f" · evidence {rank}"
            for rank, strongest in enumerate(evidence[k], 1)
            if chunk["start"] <= strongest["start"] < strongest["end"] <= chunk["end"]
        )
        return _signed(chunk["scores"][explained[k]]) + "".join(ranks)

    end = 0
    for number, (chunk, strength_E) in enumerate(zip(chunks, strength_CE, strict=True), 1):
        if text[end : chunk["start"]].strip():
            yield piece('class="unread"', ["Not encoded"], end, chunk["start"])
        facts = [f"Chunk {number}", of_chosen([contribution(chunk, k) for k in range(len(explained))])]
        colors = "; ".join(f"--of-{k}: {strength:.0f}%" for k, strength in enumerate(strength_E))
        attributes = f'id="chunk-{number}" style="{colors}"'
        yield piece(attributes, facts, max(end, chunk["start"]), max(end, chunk["end"]))
        end = max(end, chunk["end"])
    if text[end:].strip():
        yield piece('class="unread"', ["Not encoded"], end, len(text))


# ---- The page --------------------------------------------------------------------------------------------------------------


def build_page(
    classifier: Pipeline, max_upload_mb: int, max_characters: int, review_below: float, review_margin: float
) -> Any:
    """The page, as `gradio.Blocks`, with the endpoint /classify."""
    import gradio as gr

    config = classifier.model.config
    classifier("Warm up.")
    model_lock = threading.Lock()  # the examples are not in the queue of the others

    def in_a_sentence(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*given: Any, **more: Any) -> Any:
            try:
                return function(*given, **more)
            except (ValueError, OSError) as error:
                message = html.escape(str(error), quote=False)
                raise gr.Error(message, duration=None, print_exception=False) from error

        return call

    def show(text: str, name: str, sections: list[Section], progress: Any) -> str:
        check_text(text, max_characters)
        progress(0, desc="Tokenizing")
        report = functools.partial(progress, desc="Encoding the text", unit="chunks")
        with model_lock, counting_chunks(classifier.model, report):
            [result] = classifier(text, chunks=True)
        return render_result(result, text, sections, name, config, review_below, review_margin)

    @in_a_sentence
    def show_text(text: str, progress: Any = gr.Progress()) -> str:  # noqa: B008 (as gradio has it)
        return show(text, "Pasted text", [], progress)

    @in_a_sentence
    def show_file(file: str, progress: Any = gr.Progress()) -> str:  # noqa: B008
        progress(0, desc="Reading the file")
        text, sections = read_upload(Path(file), max_upload_mb * 2**20)
        return show(text, Path(file).name, sections, progress)

    @in_a_sentence
    def classify(text: str) -> dict:
        """Label (or labels), scores and evidence of a text, as the model's pipeline returns them."""
        check_text(text, max_characters)
        with model_lock:
            [result] = classifier(text)
        return {name: result[name] for name in ENDPOINT_KEYS if name in result}

    stories = [write_story(label, size, 30, np.random.default_rng(seed))[0] for label, (size, seed) in STORIES.items()]
    one_at_a_time: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
    names = list(config.id2label.values())
    labels = ", ".join(names[:MOST_BARS]) + (f" and {len(names) - MOST_BARS:,} more" if len(names) > MOST_BARS else "")
    # Without files of an earlier visitor for longer than an hour, if one was uploaded and never read.
    with gr.Blocks(title="Classify a text", analytics_enabled=False, delete_cache=(60, 3600)) as page:
        gr.HTML(
            f'<div class="page"><h1>Classify a text</h1><p class="soft">Labels: {html.escape(labels)}. Texts of up to '
            f"{max_characters:,} characters, files of up to {max_upload_mb} MB. Nothing is kept.</p></div>"
        )
        with gr.Row(equal_height=True):
            text = gr.Textbox(label="Text", placeholder="Paste a text", lines=9, max_lines=9, scale=3)
            file = gr.File(label="Or a file", file_types=sorted(DOCUMENT_SUFFIXES), height=200, scale=1)
        button = gr.Button("Classify", variant="primary")
        output = gr.HTML(min_height=120, render=False)
        gr.Examples(
            [[story] for story in stories],
            [text],
            [output],
            show_text,
            cache_examples=False,
            run_on_click=True,
            label="Made-up stories",
            example_labels=[f"A story of the demo, rated {label}" for label in STORIES],
            api_visibility="private",
        )
        output.render()
        private: dict[str, Any] = {**one_at_a_time, "api_visibility": "private", "show_progress_on": output}
        button.click(show_text, text, output, **private)
        uploaded = file.upload(show_file, file, output, **private)
        for ended in (uploaded.success, uploaded.failure):
            ended(lambda: None, None, file, queue=False, api_visibility="private")
        gr.api(classify, api_name="classify", **one_at_a_time)
    return page.queue(max_size=100, api_open=False)


def serve(
    classifier: Pipeline,
    host: str | None = None,
    port: int | None = None,
    max_upload_mb: int = MAX_UPLOAD_MB,
    max_characters: int = MAX_CHARACTERS,
    review_below: float = REVIEW_BELOW,
    review_margin: float = REVIEW_MARGIN,
) -> None:
    """Serve the page until interrupted. Without host and port where the environment says, as in a Space."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read when gradio is imported
        import gradio as gr

        light = {
            "input_background_fill": "#fff",
            "input_border_width": "1px",
            "body_background_fill": "#faf9f6",
            "button_primary_background_fill": "#0b5cad",
        }
        dark = {"body_background_fill_dark": "#15171a", "button_primary_background_fill_dark": "#0b5cad"}
        build_page(classifier, max_upload_mb, max_characters, review_below, review_margin).launch(
            server_name=host,
            server_port=port,
            max_file_size=max_upload_mb * 2**20,
            theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]).set(**light, **dark),
            css=CSS,
            footer_links=["api"],
            run_history=False,  # which would keep texts in the browser
            ssr_mode=False,
            share=False,
        )


def device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def main() -> None:
    from scripts.common.cli import UserParser

    parser = UserParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="output_dir of a run, or a model id on the Hub")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: reachable from elsewhere")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on")
    parser.add_argument("--max_upload_mb", type=int, default=MAX_UPLOAD_MB, help="size limit of a file, in MB")
    parser.add_argument("--max_characters", type=int, default=MAX_CHARACTERS, help="length limit of a text")
    parser.add_argument(
        "--review_below",
        type=float,
        default=REVIEW_BELOW,
        help="score below which the page advises a check by a person",
    )
    parser.add_argument(
        "--review_margin",
        type=float,
        default=REVIEW_MARGIN,
        help="with several labels, the page advises a check if a score is closer to its threshold than this share of the "
        "way from the threshold to 0 or 1",
    )
    parser.add_argument("--cpu_threads", type=int, default=0, help="number of CPU threads; 0 uses all cores")
    options = vars(parser.parse_args())
    for name in ("max_upload_mb", "max_characters"):
        if options[name] < 1:
            raise ValueError(f"--{name} must be 1 or more, got {options[name]}.")
    for name in ("review_below", "review_margin"):
        if not 0 <= options[name] <= 1:
            raise ValueError(f"--{name} must be between 0 and 1, got {options[name]}.")
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("The page needs gradio, which comes with the extra `app`: pip install -e '.[app]'.")

    from modeling.hierarchical_roberta.pipeline import HierarchicalClassificationPipeline
    from modeling.training.runtime import set_num_threads
    from scripts.common.loading import load_classifier

    set_num_threads(options.pop("cpu_threads"))
    model, tokenizer = load_classifier(options.pop("model"))
    del options["log_level"]
    serve(
        HierarchicalClassificationPipeline(
            model=model, tokenizer=tokenizer, device=device(), task="text-classification"
        ),
        **options,
    )


if __name__ == "__main__":
    if MODEL:
        serve(
            pipeline("text-classification", os.environ.get("MODEL_ID", MODEL), device=device(), trust_remote_code=True)
        )
    else:
        from scripts.common.cli import run_main

        sys.exit(run_main(main))
