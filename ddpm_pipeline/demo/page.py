"""The page: four tabs of gradio over the jobs of one model.

One job runs at a time, the others wait in a queue of bounded length. Nothing is loaded from other hosts.
"""

import html
import io
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware
from torch import Tensor

from ..arguments import MAX_SEED
from ..scheduling_ddpm import check_int
from . import figures
from .gate import Gate
from .jobs import MAX_IMAGES, MAX_UPLOAD_BYTES, Model, Progress, Sampling, TimeUpError
from .texts import TEXTS, language_of

HERE = Path(__file__).parent
MAX_WAITING = 20  # jobs in the queue; further ones are refused
MAX_MESSAGE = 500  # characters of what a visitor is told, which may repeat what came
MAX_SESSIONS = 100  # visits whose results and settings are remembered
KEEP_FILES = 3600  # seconds that an uploaded image stays on the disk
PREVIEW_EVERY = 4  # steps of sampling between two previews
DEFAULT_STEPS = 25
DEFAULT_NUMBER = 4

TRANSLATIONS = gr.I18n(
    **{
        locale: {f"demo.{key}": value for key, value in TEXTS[language].items()}
        for locale, language in (("en", "en"), ("zh", "zh"), ("zh-CN", "zh"), ("zh-TW", "zh"))
    }
)
FONTS = ["system-ui", "sans-serif"]  # of the visitor's machine


def serve(model: Model, host: str = "127.0.0.1", port: int = 7860, share: bool = False) -> None:
    """Serve the page until SIGINT (Ctrl-C) or SIGTERM.

    Args:
        port: 0 for a free one from 7860 on.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an orderly end, which deletes the uploads
    with serving(model, host, port, share) as page:
        shown = f"[{host}]" if ":" in host else host
        addresses = filter(None, (f"http://{shown}:{page.server_port}", page.share_url))
        print("Ctrl-C stops the demo, which is at", " and at ".join(addresses), flush=True)
        page.block_thread()


@contextmanager
def serving(model: Model, host: str = "127.0.0.1", port: int = 0, share: bool = False) -> Iterator[gr.Blocks]:
    """Serve the page, `page.local_url`, in the background. At the end the uploads are deleted."""
    with tempfile.TemporaryDirectory(prefix="ddpm-demo-", ignore_cleanup_errors=True) as folder:
        # gradio reads these now: where uploads are, and how many jobs it remembers for a page on how long they took
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_MAX_EVENTS": "1"}
        os.environ |= {"GRADIO_ANALYTICS_CACHE_FREQUENCY": "1000000000"}  # jobs between two of its tables
        page = make_page(model)
        _check_free(host, port)
        try:
            page.launch(
                server_name=host, server_port=port or None, share=share, prevent_thread_lock=True, show_error=False,
                max_file_size=MAX_UPLOAD_BYTES, footer_links=[], ssr_mode=False, pwa=False, mcp_server=False,
                enable_monitoring=False, run_history=False, quiet=True, state_session_capacity=MAX_SESSIONS,
                i18n=TRANSLATIONS,
                app_kwargs={"middleware": [Middleware(Gate, folder=Path(folder))]},
                theme=gr.themes.Default(font=FONTS, font_mono=["ui-monospace", "monospace"]),
                _frontend=False,  # else it gives up if the page takes three seconds, as on a busy machine
                css=(HERE / "demo.css").read_text(), head=f"<script>{(HERE / 'demo.js').read_text()}</script>",
            )  # fmt: skip
            yield page
        finally:
            page.close(verbose=False)


def _check_free(host: str, port: int) -> None:
    """Raise ValueError if another program has this port."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as error:
            raise ValueError(f"host and port are {host} and {port}: {error.strerror}; give others") from None


def text(key: str) -> Any:
    """A text that the browser looks up in its language. With a prefix, since gradio has texts of its own."""
    return TRANSLATIONS(f"demo.{key}")


def make_page(model: Model) -> gr.Blocks:
    page = gr.Blocks(title=f"{model.name} - ddpm_pipeline", analytics_enabled=False, delete_cache=(60, KEEP_FILES))
    with page:
        gr.Markdown(f"# {model.name}")
        with gr.Tabs():
            for name, tab in (
                ("generate", _generate_tab),
                ("interpolate", _interpolate_tab),
                ("repair", _repair_tab),
                ("trajectory", _trajectory_tab),
            ):
                with gr.Tab(text(name), elem_id=f"demo-{name}"):
                    gr.Markdown(text(f"help_{name}"))
                    tab(model)
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)
    page._queue.pending_messages_per_session.max_size = MAX_SESSIONS  # results that nobody fetches would stay
    return page


# ---- Tabs ------------------------------------------------------------------------------------------------------------


def _generate_tab(model: Model) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            settings = _settings(model)
            number = _number_of_images(DEFAULT_NUMBER)
            eta = _as_sent(gr.Slider(0, 1, 1, step=0.05, label=text("eta")))
            tables = [
                f"{len(table.timesteps)}" + (", w = {:g}, {:g}".format(*table.guidance[:2]) if any(
                    scale != 1 for scale in table.guidance[:2]) else "") for table in model.tables
            ]  # fmt: skip
            table = _as_sent(gr.Dropdown(
                [("-", -1), *((name, i) for i, name in enumerate(tables))], value=-1, label=text("calibrated"),
                visible=bool(tables),
            ))  # fmt: skip
            button = gr.Button(text("run_generate"), variant="primary")
        output = _output()

    def generate(request: gr.Request, number: Any, eta: Any, table: Any, *settings: Any) -> Iterator[str]:
        texts = _texts(request)
        sampling = _sampling(texts, *settings)
        number_of_table = check_int("calibrated", table, -1, len(model.tables) - 1)
        chosen = None if number_of_table == -1 else model.tables[number_of_table]
        for i, now in enumerate(model.generate(sampling, number, eta, chosen)):
            if not isinstance(now, Progress):
                yield figures.gallery(now, sampling.seed, texts)
            elif i % PREVIEW_EVERY == 0:
                yield figures.progress(now, texts)

    _on_click(button, model, generate, [number, eta, table, *settings], output)


def _interpolate_tab(model: Model) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            with gr.Row():
                first, second = _image_input(model, "first", 1), _image_input(model, "second", 2)
            settings = _settings(model, sampled=False)
            balance = gr.Checkbox(True, label=text("balance"))
            button = gr.Button(text("run_interpolate"), variant="primary")
        output = _output()

    def interpolate(request: gr.Request, a: str | None, b: str | None, balance: bool, *settings: Any) -> str:
        texts = _texts(request)
        image_a, image_b = (_read(model, path, texts) for path in (a, b))
        return figures.strip(model.interpolate(image_a, image_b, _sampling(texts, *settings), balance), texts)

    _on_click(button, model, interpolate, [first, second, balance, *settings], output)


def _repair_tab(model: Model) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            image = _image_input(model, "image", 1)
            gr.Markdown(text("paint"), elem_id="demo-paint")
            gr.HTML(figures.painter(model.height, model.width))
            smaller = min(model.height, model.width)
            gr.Slider(  # read in the browser, by demo.js
                1, max(2, smaller // 2), max(1, smaller // 5), step=1, label=text("brush"), elem_id="demo-brush",
                interactive=True,
            )  # fmt: skip
            clear = gr.Button(text("clear"))
            settings = _settings(model)
            number = _number_of_images(DEFAULT_NUMBER)
            button = gr.Button(text("run_repair"), variant="primary")
        output = _output()
    under_mask, mask = gr.Textbox(visible=False), gr.Textbox(visible=False)

    def repair(request: gr.Request, path: str | None, mask: str, number: Any, *settings: Any) -> str:
        texts = _texts(request)
        image = _read(model, path, texts)
        sampling = _sampling(texts, *settings)
        pictures = model.repair(image, model.read_mask(mask), sampling, number)
        return figures.gallery(pictures, sampling.seed, texts)

    def show(request: gr.Request, path: str | None) -> str:
        return "" if path is None else figures.uri(model.preview(_read(model, path, _texts(request))))

    image.change(
        _told(model, show), image, under_mask, api_name="show", api_visibility="private", concurrency_id="previews",
        concurrency_limit=1,
    ).then(None, under_mask, None, js="(uri) => { ddpmDemo.setImage(uri); }", api_visibility="private")  # fmt: skip
    clear.click(None, None, None, js="() => { ddpmDemo.clear(); }", api_visibility="private")
    in_browser = "(path, mask, ...others) => [path, ddpmDemo.mask(), ...others]"
    _on_click(button, model, repair, [image, mask, number, *settings], output, js=in_browser)


def _trajectory_tab(model: Model) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            image = _image_input(model, "image", 1)
            settings = _settings(model)
            button = gr.Button(text("run_trajectory"), variant="primary")
        output = _output()

    def trajectory(request: gr.Request, path: str | None, *settings: Any) -> Iterator[str]:
        texts = _texts(request)
        image = None if path is None else _read(model, path, texts)
        for i, now in enumerate(model.trajectory(image, _sampling(texts, *settings))):
            if not isinstance(now, Progress):
                yield figures.trajectory(now, texts)
            elif i % PREVIEW_EVERY == 0:
                yield figures.progress(now, texts)

    _on_click(button, model, trajectory, [image, *settings], output)


# ---- Parts of a tab --------------------------------------------------------------------------------------------------


def _settings(model: Model, sampled: bool = True) -> list[Any]:
    """The inputs of `Sampling`, in its order; those that the model has no use for are invisible.

    Args:
        sampled: with noise, which has a seed, and with guidance.
    """
    inputs = [
        _seed_input(0, visible=sampled),
        gr.Slider(1, model.max_steps, min(DEFAULT_STEPS, model.max_steps), step=1, label=text("steps")),
        gr.Dropdown(
            [(name, i) for i, name in enumerate(model.class_names)] or [("-", 0)], value=0, label=text("class"),
            visible=bool(model.class_names),
        ),
        gr.Slider(0, 8, 1, step=0.1, label=text("guidance"), visible=sampled and model.takes_guidance),
        gr.Slider(0, 4, 1, step=0.1, label=text("autoguidance"), visible=sampled and model.takes_autoguidance),
    ]  # fmt: skip
    return [_as_sent(each) for each in inputs]


def _as_sent(component: Any) -> Any:
    """An input whose value comes as the browser has sent it, to be checked where it is used.

    Of a wrong one gradio would write a traceback, and not say which input it is.
    """
    component.preprocess = lambda value: value
    return component


def _seed_input(value: int, label: str = "seed", visible: bool = True) -> Any:
    return _as_sent(
        gr.Number(value, label=text(label), precision=0, minimum=0, maximum=MAX_SEED - MAX_IMAGES, visible=visible)
    )


def _sampling(
    texts: dict[str, str], seed: Any, steps: Any, class_label: Any, guidance: Any, autoguidance: Any
) -> Sampling:
    return Sampling(_seed(texts, seed), steps, class_label, guidance, autoguidance)


def _seed(texts: dict[str, str], seed: Any) -> Any:
    if seed is None:
        raise ValueError(texts["no_seed"])
    return seed


def _number_of_images(value: int) -> Any:
    return _as_sent(gr.Slider(1, MAX_IMAGES, value, step=1, label=text("number")))


def _output() -> Any:
    with gr.Column(scale=2, min_width=280, elem_classes="demo-results-column"):
        return gr.HTML(label=text("results"), elem_classes="demo-output", min_height=280)


def _image_input(model: Model, label: str, seed: int) -> Any:
    """An image that is dropped, pasted or drawn from the model; its value is the path of a file."""
    with gr.Column(min_width=120):
        image = gr.Image(
            label=text(label), type="filepath", image_mode=None, sources=["upload", "clipboard"], format="png",
            height=200, elem_classes="demo-upload", buttons=[],
        )  # fmt: skip
        # the path of the file as it was uploaded: gradio would decode it
        image.preprocess = lambda payload: None if payload is None else payload.path
        with gr.Row():
            number = _seed_input(seed, "seed_to_draw")
        button = gr.Button(text("draw"), size="sm")

    def draw(request: gr.Request, seed: Any) -> Image.Image:
        drawn = model.draw(Sampling(_seed(_texts(request), seed), min(DEFAULT_STEPS, model.max_steps)))
        return Image.open(io.BytesIO(drawn.png))

    _on_click(button, model, draw, [number], image)
    return image


def _on_click(button: Any, model: Model, job: Callable[..., Any], inputs: Any, output: Any, js: Any = None) -> None:
    """Run a job at a click; all jobs of the page share one worker. A second click waits for the first."""
    button.click(
        _told(model, job), inputs, output, js=js, concurrency_id="device", concurrency_limit=1,
        trigger_mode="once", api_name=job.__name__, api_visibility="private", show_progress="minimal",
    )  # fmt: skip


def _told(model: Model, job: Callable[..., Any]) -> Callable[..., Any]:
    """A job as a generator whose expected errors are told to the visitor; of others only the server's log knows."""

    def told(request: gr.Request, *inputs: Any) -> Iterator[Any]:
        try:
            values = job(request, *inputs)
            if isinstance(values, Iterator):
                yield from values
            else:
                yield values
        except TimeUpError:
            raise gr.Error(
                _texts(request)["too_long"].format(seconds=model.time_limit), print_exception=False
            ) from None
        except ValueError as error:
            raise gr.Error(html.escape(str(error)[:MAX_MESSAGE], quote=False), print_exception=False) from None

    return told


def _read(model: Model, path: str | None, texts: dict[str, str]) -> Tensor:
    if path is None:
        raise ValueError(texts["no_image"])
    return model.read(Path(path).read_bytes())


def _texts(request: gr.Request) -> dict[str, str]:
    return TEXTS[language_of(request.headers)]
