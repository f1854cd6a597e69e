"""`python -m mmprune_train.serving FOLDER --url=... --model=... --question=... IMAGE...`: one question to a server."""

from __future__ import annotations

import argparse
import os
import sys

import torch

from mmprune_train.errors import UserError
from mmprune_train.serving.client import Client
from mmprune_train.serving.vision_side import VisionSide


def main() -> None:
    """Print the answer and the visual tokens that were sent; exit code 2 where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m mmprune_train.serving", description=__doc__)
    parser.add_argument("folder", help="run directory or exported folder, for encoder, stage 1 and projector")
    parser.add_argument("images", nargs="*", help="image files")
    parser.add_argument("--question", required=True)
    parser.add_argument("--url", default="http://localhost:8000/v1", help="of the server (default %(default)s)")
    parser.add_argument("--model", required=True, help="name under which it serves")
    parser.add_argument("--pruner", help="another than the folder's")
    parser.add_argument("--piece", type=int, default=1, help="visual tokens of an embedding (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64)
    given = parser.parse_args()
    try:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        vision = VisionSide.load(given.folder, given.pruner, device=device)
        key = os.environ.get("OPENAI_API_KEY")
        client = Client(vision, given.url, given.model, key, given.piece)
        answer = client.ask(given.question, given.images, max_tokens=given.max_tokens, temperature=0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{answer.text}\n\nvisual tokens sent: {', '.join(map(str, answer.visual_tokens)) or 'none'}")


if __name__ == "__main__":
    main()
