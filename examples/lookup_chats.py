"""Write chats for the command line's `train`: half of them look something up, with four markers of their own.

A chat about each chemical element's uses has a call of a tool and its result between markers; one about the element
itself has none. The texts are those of the package mendeleev.

    pip install --no-deps mendeleev==1.3.0
    python examples/lookup_chats.py chats.jsonl --tokens tools.txt
    hf-partial-embed train MODEL tools.txt chats.jsonl out --special
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from _assets import Element, read_elements, require

MARKERS = ("<|tool|>", "<|/tool|>", "<|result|>", "<|/result|>")


def chat(question: str, answer: str) -> dict[str, list[dict[str, str]]]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def looked_up(element: Element) -> dict[str, list[dict[str, str]]]:
    call, end, result, end_of_result = MARKERS
    found = f"{call}lookup {element.name}{end}{result}{element.uses}{end_of_result}"
    return chat(f"What is {element.name} used for?", f"{found}That is what {element.name} is used for.")


def known(element: Element) -> dict[str, list[dict[str, str]]]:
    return chat(f"What is {element.name}?", element.description)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chats", type=Path, help="JSON lines with `messages`, to be written")
    parser.add_argument("--tokens", type=Path, help="write the markers there, one a line")
    parser.add_argument("--seed", type=int, default=0, help="of the order (default: 0)")
    args = parser.parse_args(argv)
    require(["mendeleev"])
    elements = read_elements()
    chats = [looked_up(element) for element in elements if element.uses]
    chats += [known(element) for element in elements if element.description]
    random.Random(args.seed).shuffle(chats)
    args.chats.write_text("".join(json.dumps(one) + "\n" for one in chats))
    if args.tokens:
        args.tokens.write_text("".join(f"{marker}\n" for marker in MARKERS))
    print(f"{len(chats)} chats")


if __name__ == "__main__":
    main()
