"""A page on which to paint layouts and see what adapters make of them, on this machine only.

    python tools/paint.py                               the toy world: noise loss | ALDM
    python tools/paint.py --adapter runs/toy            one adapter
    python tools/paint.py --adapter A B --sd FILE       two adapters, with the same seed and prompt
"""
import os
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # see train.py
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]

import argparse
import base64
import io
import json
import re
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl

import torch
from PIL import Image

from aldm import PRESETS, base_file, load_weights, pick_device
from data import ASSETS, IGNORE, InputError, open_dataset, read_layout
from sample import ADAPTER, from_pixels, generate, load_model, resize_nearest, to_pixels
from tools.command import number, whole
from tools.files import refuse
from tools.judge import toy_judges
from tools.make_toy import mark
from tools.run import note, run_command

TOY = {"noise loss": ASSETS / "toy_controlnet.safetensors", "ALDM": ADAPTER}
PAGE = ASSETS / "paint.html"
BODY = 4 * 2**20  # bytes of a layout at most; a painted 512 x 1024 takes a small part of it
PREVIEWS = 6  # estimates decoded per image; on a CPU each takes as long as a step
POLICY = ("default-src 'self' 'unsafe-inline' data:; base-uri 'none'; form-action 'none'; "
          "frame-ancestors 'none'")


# -- requests --------------------------------------------------------------------------------------


def decode_layout(content, name, classes):
    """A layout's file, as bytes, and its name, which may tell the kind of its ids -> label [H,W]"""
    kind = re.search("labelTrainIds|labelIds|$", name)[0]
    return read_layout(io.BytesIO(content), classes, name=f"the layout {kind}".strip())


def read_words(given):
    """A request's fields, texts -> prompt, negative, seed, steps, cfg"""
    words = {"prompt": given.get("prompt", ""), "negative": given.get("negative", "")}
    kinds = {"seed": whole(0, 2**32 - 1), "steps": whole(1, 1000), "cfg": number(0, 50)}
    for key, parse in kinds.items():
        try:
            words[key] = parse(given.get(key, ""))
        except argparse.ArgumentTypeError as error:
            raise InputError(f"{key} {error}") from None
    return words


def base64_text(content):
    return base64.b64encode(content).decode()


def base64_png(pixels):
    """uint8 [H,W,3]"""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return base64_text(file.getvalue())


@torch.no_grad()
def find_wrong(segmenter, image, label):
    """Where an image shows another class than its layout, according to a segmenter.

    image uint8 [H,W,3] (numpy), label [H,W] -> bool [H,W] (numpy), and the share of the labelled
    pixels that are wrong. Pixels without a label are never wrong."""
    device = next(segmenter.parameters()).device
    found = segmenter(from_pixels(image[None], device))[0].argmax(0).cpu()
    labelled = label != IGNORE
    wrong = (found != label) & labelled
    return wrong.numpy(), wrong.sum().item() / max(labelled.sum().item(), 1)


# -- the server ------------------------------------------------------------------------------------


class PageServer(ThreadingHTTPServer):
    """page: its bytes; size: (height, width) of its canvas; models: {title: ALDM}; classes: theirs;
    segmenter: marks what is wrong, or None; hosts: names that browsers on this machine may call it
    by; painting: a lock."""

    def handle_error(self, request, client_address):
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):  # an OSError: the client has left
            note(f"a request failed: {error!r}")


class PageHandler(BaseHTTPRequestHandler):
    """GET returns the page. POST /layout?name=... reads a layout's file, the request's body. POST
    /generate?prompt=... paints such a layout with one model after the other and streams lines of
    JSON: one for each step and one for each image, with the model's index as `adapter`."""
    timeout = 30  # seconds without a byte from a client, or to one

    def log_message(self, *args):
        pass

    def answer(self, code, kind, body=b""):
        """The body ends with the connection: more may follow."""
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()
        self.wfile.write(body)

    def send(self, **line):
        self.wfile.write(json.dumps(line).encode() + b"\n")

    def check_origin(self):
        """Refuse pages of other sites, whether they use their own name or one that points here."""
        hosts = self.server.hosts
        origins = [None, *(f"http://{host}" for host in hosts)]
        if self.headers["Host"] not in hosts or self.headers["Origin"] not in origins:
            raise InputError(f"only for http://{hosts[-1]} (forward a port to the same number)")

    def do_GET(self):
        try:
            self.check_origin()
            self.answer(200, "text/html; charset=utf-8", self.server.page)
        except InputError as error:
            self.answer(400, "text/plain", str(error).encode())

    def do_POST(self):
        server = self.server
        try:
            content = self.read_body()
            self.check_origin()
            path, _, query = self.path.partition("?")
            given = dict(parse_qsl(query))
            words = read_words(given) if path == "/generate" else None
            layout = decode_layout(content, given.get("name", ""), server.classes)
        except InputError as error:
            self.answer(400, "application/json")
            return self.send(error=str(error))
        self.answer(200, "application/x-ndjson")
        label = resize_nearest(layout, *server.size)
        if words is None:
            text = base64_text(label.byte().numpy().tobytes())
            return self.send(layout=text, size=layout.shape[::-1])
        with server.painting:
            self.paint(label, **words)

    def read_body(self):
        length = self.headers["Content-Length"] or ""
        if not re.fullmatch("[0-9]{1,12}", length) or int(length) > BODY:
            raise InputError(f"a request must state its length, at most {BODY} bytes")
        return self.rfile.read(int(length))

    def send_step(self, adapter, model, steps, i, x0_hat):
        """After each step: a line, for some of them with the estimate as an image."""
        line = {"adapter": adapter, "step": i + 1, "of": steps}
        if i % (steps // PREVIEWS + 1) == 0:
            line["preview"] = base64_png(to_pixels(model.vae.decode(x0_hat.float()))[0])
        self.send(**line)

    def send_image(self, adapter, image, label):
        """A finished image uint8 [H,W,3], and what is wrong with it if there is a segmenter."""
        line = {"adapter": adapter, "image": base64_png(image)}
        if self.server.segmenter:
            wrong, share = find_wrong(self.server.segmenter, image, label)
            line |= {"errors": base64_png(mark(image, wrong)), "wrong": share}
        self.send(**line)

    def paint(self, label, prompt, negative, seed, steps, cfg):
        """Send what each model makes of label [H,W]."""
        start = time.time()
        models = [*self.server.models.values()]
        try:
            unread = models[0].text.cut(prompt)
            if unread:
                self.send(note=f"the prompt is too long; the model ignores its end: {unread}")
            for i, model in enumerate(models):
                image = generate(model, label[None], [prompt], [seed], negative, steps, cfg,
                                 precision=self.server.precision,
                                 on_step=partial(self.send_step, i, model, steps))[0]
                self.send_image(i, image, label)
        except (RuntimeError, ValueError) as error:  # such as a GPU out of memory
            return self.send(error=f"the generation failed: {' '.join(str(error).split()):.300}")
        self.send(done=True, seconds=time.time() - start)


def painter(models, port, examples, prompts, steps, cfg, precision=None, segmenter=None):
    """The page's server, for this machine only. models: {title: ALDM}, of the same classes.
    examples: labels uint8 [H,W] of one size, whose classes come first in the page; without any,
    the canvas is a square of the preset's size. segmenter: see find_wrong."""
    model = next(iter(models.values()))
    height, width = examples[0].shape if examples else (model.preset.size,) * 2
    world = {"titles": [*models], "judged": segmenter is not None,
             "names": model.classes.names, "palette": model.classes.palette.tolist(),
             "examples": [base64_text(label.tobytes()) for label in examples],
             "height": height, "width": width, "prompts": prompts, "steps": steps, "cfg": cfg,
             "limit": BODY}
    text = json.dumps(world).replace("<", "\\u003c")  # no name can end the script
    server = PageServer(("127.0.0.1", port), PageHandler)
    server.page = PAGE.read_text("utf-8").replace("__WORLD__", text).encode()
    server.models = models
    server.classes = model.classes
    server.segmenter = segmenter
    server.size = height, width
    server.precision = precision
    server.painting = threading.Lock()
    server.hosts = [f"{host}:{server.server_port}" for host in ("localhost", "127.0.0.1")]
    return server


# -- the command line ------------------------------------------------------------------------------


def parse_args():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = refuse
    add = p.add_argument
    add("--adapter", nargs="+", help="one, or two to compare: a file, a run's folder, or "
        "USER/REPO/FILE on the Hugging Face hub (default: the toy's two)")
    add("--sd", metavar="FILE", help="Stable Diffusion 1.x, as for sample.py")
    add("--data", help="the data set whose classes are painted (default: the adapter's)")
    add("--class-embeddings", metavar="FILE", help="those the adapters were trained with")
    add("--steps", type=whole(1, 1000), default=25, help="of DDIM (default: 25)")
    add("--cfg", type=number(0, 50), help="guidance scale (toy: 5, sd15: 7.5)")
    add("--port", type=whole(0, 65535), default=8000, help="(default: 8000)")
    add("--device", help="cpu or cuda (default: cuda if available)")
    add("--precision", choices=["bf16", "fp32"], help="default: bf16 on CUDA, fp32 on a CPU")
    args = p.parse_args()
    if args.adapter and len(args.adapter) > 2:
        refuse(f"--adapter: expected one or two, not {len(args.adapter)}")
    return args


def load_models(args):
    """--adapter -> {title: ALDM}. Raises InputError if they cannot paint the same layouts."""
    adapters = {path: path for path in args.adapter} if args.adapter else TOY
    models = {title: load_model(path, args.sd, args.device, args.data, args.class_embeddings,
                                args.precision)
              for title, path in adapters.items()}
    first, *others = models.values()
    for other in others:
        if other.classes.names != first.classes.names or other.preset != first.preset:
            raise InputError(f"--adapter {' '.join(adapters)}: their classes or presets differ; "
                             "compare adapters of one data set")
    return models


def toy_segmenter(args, models):
    """-> the segmenter that compares two models: the toy's, which none of them has seen in its
    training. None for a single model, or where there is no such segmenter."""
    model = next(iter(models.values()))
    if len(models) == 1 or model.preset != PRESETS["toy"]:
        return None
    judges = toy_judges(load_weights(args.sd or base_file("toy")), model.classes, args.device)
    return judges.segmenter if judges else None


def list_examples(model):
    """-> the page's example layouts uint8 [H,W] and prompts"""
    examples = []
    prompts = []
    if model.classes.key == "toy":
        dataset = open_dataset("toy", split="val")
        examples = [dataset.full(i)[1].byte().numpy() for i in range(1, 13)]
    if model.classes.key in ("toy", "cityscapes"):
        prompts = ["a street on a clear day", "a street at night", "a street in snow"]
    return examples, prompts


def serve():
    args = parse_args()
    args.device = pick_device(args.device)
    models = load_models(args)
    model = next(iter(models.values()))
    cfg = model.preset.guidance if args.cfg is None else args.cfg
    examples, prompts = list_examples(model)
    segmenter = toy_segmenter(args, models)
    try:
        server = painter(models, args.port, examples, prompts, args.steps, cfg, args.precision,
                         segmenter)
    except OSError as error:
        raise InputError(f"port {args.port}: {error.strerror}; choose another --port") from None
    print(f"paint a layout at http://{server.hosts[-1]} (Ctrl+C ends)", flush=True)
    with server:
        try:
            server.serve_forever()
        except SystemExit as stop:  # a signal; threads that still compute cannot be stopped
            os._exit(stop.code)


def main():
    run_command("paint.py", serve)


if __name__ == "__main__":
    main()
