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
MAX_UPLOAD_MB, MAX_CHARACTERS, REVIEW_BELOW = 20, 1_000_000, 0.7
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
.scores .meter { height: .8rem; background: var(--middle); border-radius: 4px; overflow: hidden; } .scores i { display: block; height: 100%; background: var(--bar); }
.strip { display: flex; flex-wrap: wrap; gap: 4px; max-height: 13rem; overflow-y: auto; padding: 3px !important; }
.page .strip a { display: block; width: 2.7rem; padding: .15rem 0; border: 1px solid var(--line); border-radius: 4px; text-align: center;
  text-decoration: none; color: var(--ink); line-height: 1.2; font-size: .85rem; } .strip small { display: block; font-size: .7rem; }
.page .many a { width: 1.65rem; padding: .3rem 0; font-size: .65rem; } .many small { display: none !important; }
.page .strip a:hover { border-color: var(--ink); } .supports { --hue: var(--for); } .opposes { --hue: var(--against); }
.strip a { background: color-mix(in oklab, var(--hue, var(--middle)) var(--strength, 0%), var(--middle)); }
.scale { display: inline-block; width: 7rem; height: .8rem; border-radius: 3px; vertical-align: middle; margin: 0 .5rem;
  background: linear-gradient(in oklab 90deg, var(--against), var(--middle), var(--for)); }
.box { max-height: 75vh; overflow-y: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 0 1rem 1rem; }
.box > div { padding-top: .8rem; scroll-margin: .5rem; content-visibility: auto; contain-intrinsic-size: auto 9rem; }
.box > :target { outline: 2px solid var(--link); outline-offset: -1px; border-radius: 6px; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; padding: .4rem .7rem; border-radius: 6px;
  background: color-mix(in oklab, var(--hue, var(--card)) calc(var(--strength, 0%) * .5), var(--card)); }
.unread .text { color: var(--soft); background: repeating-linear-gradient(45deg, var(--line) 0 3px, var(--card) 3px 8px); background-size: 8px 100%; background-repeat: no-repeat; padding-left: 1.2rem; }
.page mark { background: none; font-weight: 600; text-decoration: underline 2px; text-underline-offset: 3px; }
"""


def check_text(text: str, max_characters: int) -> str:
    """Raises ValueError if there is no text, too much of it, or something else than text."""
    if not text.strip():
        raise ValueError("There is no text: paste one, or drop a file.")
    if len(text) > max_characters:
        raise ValueError(f"The text has {len(text):,} characters, and this page takes up to {max_characters:,}.")
    if len(found := CONTROL.findall(text)) > len(text) / 100:
        raise ValueError(
            f"This is not a text: {len(found):,} of its {len(text):,} characters are control characters. Paste the text "
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
    result: dict[str, Any], text: str, sections: list[Section], name: str, config: Any, review_below: float
) -> str:
    label, chunks = html.escape(result["label"]), result["chunks"]
    strongest = max(abs(chunk["score"]) for chunk in chunks) or 1.0
    colors = [
        f'class="{"supports" if chunk["score"] > 0 else "opposes"}" style="--strength: '
        f'{100 * abs(chunk["score"]) / strongest:.0f}%"'
        for chunk in chunks
    ]
    evidence = ", ".join(
        f'<a href="#chunk-{number}">chunk {number}</a>'
        for found in result["evidence"]
        for number, chunk in enumerate(chunks, 1)
        if chunk["start"] <= found["start"] < found["end"] <= chunk["end"]
    )
    scores = "".join(
        f"<li><span>{html.escape(name)}</span><span class='meter'><i style='width: {100 * score:.1f}%'></i></span>"
        f"<span>{100 * score:.1f} %</span></li>"
        for name, score in result["scores"].items()
    )
    strip = "".join(
        f'<li><a href="#chunk-{i}" {color} aria-label="Chunk {i}, {chunk["score"]:+.2f}">{i}<small>{_signed(chunk["score"])}</small></a></li>'
        for i, (chunk, color) in enumerate(zip(chunks, colors, strict=True), 1)
    )
    return f"""<div class="page"><section aria-label="Result">
<p class="label" role="status"><strong>{label}</strong></p>
<p class="soft">{html.escape(name)}: {len(text):,} characters, {result["num_chunks"]:,} chunks</p>
{render_advice(result, config, review_below)}
<ul class="scores" aria-label="{"Calibrated scores" if config.temperature else "Scores"}">{scores}</ul>
<h2>Chunks</h2>
<p class="soft">What each chunk contributes to {label}: how much lower its log-odds are without the chunk. Choose one to see its text.</p>
<p class="soft" aria-hidden="true">against<span class="scale"></span>for</p>
<ol class="strip{" many" * (len(chunks) > 60)}">{strip}</ol>
<h2>Text</h2>
<p class="soft">Evidence, strongest first: {evidence}</p>
<div class="box" tabindex="0" role="region" aria-label="Text">{"".join(render_text(result, text, sections, colors))}</div>
</section></div>"""


def _signed(score: float) -> str:
    return "0.0" if abs(score) < 0.05 else f"{score:+.1f}".replace("-", "−")


def render_advice(result: dict[str, Any], config: Any, review_below: float) -> str:
    """Whether a person should look at the text, and why."""
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
    if result["truncated"]:
        reasons.append(f"The text is longer than the {len(result['chunks']):,} chunks that the model reads of one.")
    if not reasons:
        return f'<p class="soft">The score is at least {100 * review_below:.0f} %: no check by a person is advised.</p>'
    return f'<p class="advice"><strong>A person should check this.</strong> {html.escape(" ".join(reasons))}</p>'


def render_text(result: dict[str, Any], text: str, sections: list[Section], colors: list[str]) -> Iterator[str]:
    """The whole text in pieces: chunks, each from where the one before it ends, and what was not encoded."""
    chunks, evidence, starts = result["chunks"], result["evidence"], [section.start for section in sections]
    cuts = {0, len(text), *(place for found in evidence for place in (found["start"], found["end"]))}

    def piece(attributes: str, facts: list[str], start: int, end: int) -> str:
        parts = ""
        for a, b in pairwise(sorted({start, end, *(cut for cut in cuts if start < cut < end)})):
            is_evidence = any(found["start"] <= a < found["end"] for found in evidence)
            parts += f"<mark>{html.escape(text[a:b])}</mark>" if is_evidence else html.escape(text[a:b])
        if sections:
            facts.append(sections[max(0, bisect_right(starts, start) - 1)].name)
        heading = html.escape(" · ".join(facts))
        return f'<div {attributes}><h3>{heading}</h3><div class="text" dir="auto">{parts}</div></div>'

    end = 0
    for number, (chunk, color) in enumerate(zip(chunks, colors, strict=True), 1):
        if text[end : chunk["start"]].strip():
            yield piece('class="unread"', ["Not encoded"], end, chunk["start"])
        facts = [f"Chunk {number}", _signed(chunk["score"])]
        for rank, found in enumerate(evidence, 1):
            if chunk["start"] <= found["start"] < found["end"] <= chunk["end"]:
                facts.append(f"evidence {rank}")
        yield piece(f'id="chunk-{number}" {color}', facts, max(end, chunk["start"]), max(end, chunk["end"]))
        end = max(end, chunk["end"])
    if text[end:].strip():
        yield piece('class="unread"', ["Not encoded"], end, len(text))


# ---- The page --------------------------------------------------------------------------------------------------------------


def build_page(classifier: Pipeline, max_upload_mb: int, max_characters: int, review_below: float) -> Any:
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
        return render_result(result, text, sections, name, config, review_below)

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
        """Label, scores and evidence of a text, as the model's pipeline returns them."""
        check_text(text, max_characters)
        with model_lock:
            [result] = classifier(text)
        return {name: result[name] for name in ("label", "scores", "num_chunks", "truncated", "evidence")}

    stories = [write_story(label, size, 30, np.random.default_rng(seed))[0] for label, (size, seed) in STORIES.items()]
    one_at_a_time: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
    labels = ", ".join(config.id2label.values())
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
        build_page(classifier, max_upload_mb, max_characters, review_below).launch(
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
    parser.add_argument("--cpu_threads", type=int, default=0, help="number of CPU threads; 0 uses all cores")
    options = vars(parser.parse_args())
    for name in ("max_upload_mb", "max_characters"):
        if options[name] < 1:
            raise ValueError(f"--{name} must be 1 or more, got {options[name]}.")
    if not 0 <= options["review_below"] <= 1:
        raise ValueError(f"--review_below must be between 0 and 1, got {options['review_below']}.")
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
