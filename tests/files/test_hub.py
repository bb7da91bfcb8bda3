"""Publishing on the Hub and loading from there, against the server of `hub_server`.

`huggingface_hub` reads `HF_ENDPOINT` when it is imported, so what talks to the server is another process: tests
marked `in_client` run there from their first line to their last.
"""

import functools
import inspect
import json
import os
import re
import socket
import subprocess
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from unittest.mock import patch

import pytest
import torch
import yaml
from cards import as_text, listed
from conftest import bpe_tokenizer, build_model, logits_of, snapshot
from hub_server import HubServer
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, is_offline_mode
from safetensors.torch import save

from hf_partial_embed import PartialEmbeddingError, TokenRows, add_tokens, load_tokens, train_tokens, verify_checkpoint
from hf_partial_embed.files.hub import merged_card, rows_card
from hf_partial_embed.files.rows_file import ROWS_FILE

OWNER, STRANGER = "hf_owner", "hf_stranger"
TOKENS = ["<think>", "neodymium", "ℵ₀"]
IDS = torch.arange(4, 34).view(2, 15)


def environment(url: str, home) -> dict[str, str]:
    return {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "",
        "HUGGING_FACE_HUB_TOKEN": "",
        "NO_PROXY": "127.0.0.1",
    }


@pytest.fixture(scope="module")
def server():
    with HubServer({OWNER: "me", STRANGER: "somebody"}) as running:
        yield running
        assert running.errors == []


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    """Runs a function in a process that takes the server for the Hub."""
    with ProcessPoolExecutor(1, get_context("spawn"), warnings.simplefilter, ("error", UserWarning)) as pool:
        with patch.dict(os.environ, environment(server.url, tmp_path_factory.mktemp("home"))):
            pool.submit(os.getpid).result()  # starts it
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def in_client(test):
    """Run a test with its arguments in the client's process."""

    @functools.wraps(test)
    def run(client, **arguments):
        client(_call, test.__name__, arguments)

    signature = inspect.signature(test)
    client = inspect.Parameter("client", inspect.Parameter.KEYWORD_ONLY)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), client])
    return run


def _call(name: str, arguments: dict) -> None:
    globals()[name].__wrapped__(**arguments)


def trained(kind: str = "llama", *, tied: bool = True, tokens=TOKENS, seed: int = 1, base: str = "me/base"):
    """Tokens on a model, with rows that are not their initial ones."""
    model = build_model(kind, tied=tied)
    model.config._name_or_path = base
    partial = add_tokens(model, bpe_tokenizer(), tokens, entry="added")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in partial.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return partial


def equal(a: TokenRows, b: TokenRows) -> bool:
    mine, other = a.tensors(), b.tensors()
    return a.tokens == b.tokens and mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)


def assert_same_logits(plain: torch.Tensor, live: torch.Tensor) -> None:
    """Not to the bit: they come from one matrix product or from two, and from processes with other threads."""
    torch.testing.assert_close(plain, live, rtol=1e-5, atol=1e-5)


def history(repo_id: str, revision: str = "main", token: str | None = OWNER) -> list[str]:
    """Titles of the commits, the first one first."""
    return [commit.title for commit in HfApi(token=token).list_repo_commits(repo_id, revision=revision)][::-1]


def files(repo_id: str, revision: str = "main") -> set[str]:
    return {entry.path for entry in HfApi(token=OWNER).list_repo_tree(repo_id, revision=revision)} - {".gitattributes"}


def put(repo_id: str, **contents: bytes) -> None:
    """Commit files to a new repository, `_` in their names for a dot."""
    api = HfApi(token=OWNER)
    api.create_repo(repo_id, exist_ok=True)
    operations = [CommitOperationAdd(name.replace("__", "."), data) for name, data in contents.items()]
    api.create_commit(repo_id, operations, commit_message="By hand")


# Rows


@in_client
@pytest.mark.parametrize("kind", ["llama", "phi", "gpt2", "bert-encoder"])
def test_pushed_rows_come_back_with_the_same_logits(kind, tied):
    partial = trained(kind, tied=tied)
    repo_id = f"me/rows-{kind}-{tied}"
    url = partial.push_to_hub(repo_id, token=OWNER)
    assert re.fullmatch(rf"http://127.*/{repo_id}/commit/[0-9a-f]{{40}}", url)
    assert files(repo_id) == {"README.md", ROWS_FILE}
    assert equal(TokenRows.from_pretrained(repo_id), partial.token_rows())
    model, tokenizer = build_model(kind, tied=tied), bpe_tokenizer()
    loaded = load_tokens(model, tokenizer, repo_id, trainable=False)
    assert loaded.token_ids == partial.token_ids and tokenizer.get_vocab() == partial.tokenizer.get_vocab()
    ids = torch.cat([IDS, torch.tensor([loaded.token_ids] * 2)], dim=1)
    assert torch.equal(logits_of(model, ids), logits_of(partial.model, ids))


@in_client
def test_row_set_itself_can_be_pushed():
    rows = trained().detach()
    rows.push_to_hub("me/detached", token=OWNER, commit_message="Mine")
    assert equal(TokenRows.from_pretrained("me/detached"), rows)
    assert history("me/detached") == ["initial commit", "Mine"]


@in_client
def test_second_push_is_a_second_commit_to_the_same_repository():
    for seed in (1, 2, 2):
        trained(seed=seed).push_to_hub("me/twice", token=OWNER)
    assert history("me/twice") == ["initial commit", "Upload 3 token rows", "Upload 3 token rows"]
    assert equal(TokenRows.from_pretrained("me/twice"), trained(seed=2).token_rows())


@in_client
def test_namespace_is_that_of_the_token():
    assert "/me/short/commit/" in trained().push_to_hub("short", token=OWNER)
    assert len(TokenRows.from_pretrained("me/short")) == 3


@in_client
def test_token_of_the_environment_is_enough():
    with patch.dict(os.environ, HF_TOKEN=OWNER):
        trained().push_to_hub("me/logged-in", private=True)
        assert len(TokenRows.from_pretrained("me/logged-in")) == 3


@in_client
def test_revision_is_a_branch_that_is_made():
    trained(seed=1).push_to_hub("me/branches", token=OWNER)
    trained(seed=2).push_to_hub("me/branches", token=OWNER, revision="v2")
    trained(seed=3).push_to_hub("me/branches", token=OWNER, revision="v2")
    assert len(history("me/branches")) == 2 and len(history("me/branches", "v2")) == 4
    for revision, seed in ((None, 1), ("main", 1), ("v2", 3)):
        loaded = TokenRows.from_pretrained("me/branches", revision=revision)
        assert equal(loaded, trained(seed=seed).token_rows())
    old = HfApi().list_repo_commits("me/branches", revision="v2")[1].commit_id
    assert equal(load_tokens(build_model(), bpe_tokenizer(), "me/branches", revision=old).token_rows(),
                 trained(seed=2).token_rows())  # fmt: skip


@in_client
def test_private_rows_are_for_whoever_may_read_them():
    partial = trained()
    partial.push_to_hub("me/secret", private=True, token=OWNER)
    assert HfApi(token=OWNER).model_info("me/secret").private
    model, tokenizer = build_model(), bpe_tokenizer()
    before = snapshot(model)
    for token in (None, False, STRANGER):
        with pytest.raises(PartialEmbeddingError, match=r"'me/secret': .* log in \(`hf auth login`\) or pass token="):
            load_tokens(model, tokenizer, "me/secret", token=token)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    loaded = load_tokens(model, tokenizer, "me/secret", token=OWNER)
    assert equal(loaded.token_rows(), partial.token_rows())


@in_client
def test_pull_request_leaves_the_branch_alone():
    trained(seed=1).push_to_hub("me/reviewed", token=OWNER)
    url = trained(seed=2).push_to_hub("me/reviewed", token=STRANGER, create_pr=True, commit_message="Better")
    assert url.endswith("/me/reviewed/discussions/1")
    assert history("me/reviewed", "refs/pr/1") == ["initial commit", "Upload 3 token rows", "Better"]
    assert equal(TokenRows.from_pretrained("me/reviewed"), trained(seed=1).token_rows())
    assert equal(TokenRows.from_pretrained("me/reviewed", revision="refs/pr/1"), trained(seed=2).token_rows())


@in_client
def test_push_to_an_open_pull_request_adds_a_commit_to_it():
    trained(seed=1).push_to_hub("me/amended", token=OWNER)
    trained(seed=2).push_to_hub("me/amended", token=OWNER, create_pr=True)
    trained(seed=3).push_to_hub("me/amended", token=OWNER, revision="refs/pr/1")
    assert len(history("me/amended")) == 2 and len(history("me/amended", "refs/pr/1")) == 4
    refs = HfApi().list_repo_refs("me/amended", include_pull_requests=True)
    assert [ref.name for ref in refs.branches] == ["main"] and len(refs.pull_requests) == 1


@in_client
def test_rows_of_ids_without_a_tokenizer_can_be_pushed():
    model = build_model()
    partial = train_tokens(model, None, [7, 5])
    partial.push_to_hub("me/by-id", token=OWNER)
    assert load_tokens(build_model(), None, "me/by-id").token_ids == [7, 5]
    assert "<code>id&nbsp;7</code>" in ModelCard.load("me/by-id").content


# Whole models

PLAIN = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    logits = model(ids).logits
print(json.dumps({
    "plugin": "hf_partial_embed" in sys.modules,
    "missing": sorted(info["missing_keys"]),
    "unexpected": sorted(info["unexpected_keys"]),
    "pieces": tokenizer.tokenize(sys.argv[3]),
    "vocabulary": [model.config.vocab_size, len(tokenizer)],
    "logits": logits.tolist(),
}))
"""


def test_merged_model_loads_without_the_plugin(client, server, tmp_path):
    expected = client(push_merged)
    command = [sys.executable, "-c", PLAIN, "me/merged", json.dumps(IDS.tolist()), "a<think>b"]
    variables = {**os.environ, **environment(server.url, tmp_path)}
    found = json.loads(subprocess.run(command, check=True, capture_output=True, env=variables).stdout)
    assert_same_logits(torch.tensor(found.pop("logits")), torch.tensor(expected))
    assert found == {
        "plugin": False,
        "missing": [],
        "unexpected": [],
        "pieces": ["a", "<think>", "b"],
        "vocabulary": [303, 303],
    }


def push_merged() -> list:
    partial = trained()
    url = partial.push_to_hub("me/merged", merged=True, token=OWNER)
    assert "/me/merged/commit/" in url and history("me/merged")[1:] == ["Upload model with 3 trained token rows"]
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= files("me/merged")
    partial.verify()  # the rows are still on the live model
    return logits_of(partial.model, IDS).tolist()


@in_client
def test_checkpoints_on_the_hub_are_compared(tmp_path):
    base = build_model(tied=False)
    for repo_id, size in (("me/base", "5GB"), ("me/base-in-shards", "10KB")):
        base.save_pretrained(tmp_path / repo_id, max_shard_size=size)
        HfApi(token=OWNER).create_repo(repo_id)
        HfApi(token=OWNER).upload_folder(repo_id=repo_id, folder_path=tmp_path / repo_id)
    trained(tied=False).push_to_hub("me/adapted", merged=True, token=OWNER)
    for source in ("me/base", "me/base-in-shards", tmp_path / "me/base"):
        report = verify_checkpoint(source, "me/adapted")
        assert report.only_added_rows and report.compared == 21
        assert [table.added_ids for table in report.tables.values()] == [[300, 301, 302]] * 2
    with pytest.raises(PartialEmbeddingError, match=r"checkpoint 'me/none': there is no such folder here, and no"):
        verify_checkpoint("me/base", "me/none")
    trained().push_to_hub("me/rows-only", token=OWNER)
    with pytest.raises(PartialEmbeddingError, match=r"rows-only.* has no model.safetensors"):
        verify_checkpoint("me/base", "me/rows-only")


# Model cards

ODD_TOKENS = [
    "<script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "![x](http://127.0.0.1/x.png)",
    "a\nb\r\n\n# heading",
    "| a | b |",
    "`` ` ```",
    "---",
    "</code><b>",
    "&lt;",
    "*bold* _it_ ~~no~~ $x$ <!-- --> \\",
    " two  spaces ",
    "\u202eright to left\u200b",
    "https://example.com www.example.com @me :smile: #1",
    "naïve▁ℵ字",
]


@in_client
def test_tokens_stand_in_the_card_as_text():
    trained(tokens=ODD_TOKENS).push_to_hub("me/odd", token=OWNER)
    card = ModelCard.load("me/odd")
    assert listed(card.text) == [as_text(token) for token in ODD_TOKENS]
    assert TokenRows.from_pretrained("me/odd").tokens == ODD_TOKENS


def test_rendered_card_has_no_markup_of_a_token():
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"linkify": False}).enable("table")
    card = rows_card(ODD_TOKENS, {"input_rows": (14, 16)}, base_model=None, repo_id="me/odd", file_bytes=1)
    page = markdown.render(card.text)
    assert set(re.findall(r"<(\w+)", page)) <= {
        "h1", "h2", "p", "code", "pre", "ul", "li", "table", "thead", "tbody", "tr", "th", "td"
    }  # fmt: skip
    assert page.count("<li>") == len(ODD_TOKENS)


@in_client
def test_card_names_library_and_base_model():
    trained().push_to_hub("me/described", token=OWNER)
    data = ModelCard.load("me/described").data
    assert (data.library_name, data.base_model, data.base_model_relation) == ("hf_partial_embed", "me/base", "adapter")
    trained().push_to_hub("me/described-whole", merged=True, token=OWNER)
    data = ModelCard.load("me/described-whole").data
    assert (data.library_name, data.base_model, data.base_model_relation) == ("transformers", "me/base", "finetune")


@in_client
def test_code_of_the_card_runs():
    from transformers import AutoModelForCausalLM  # noqa: F401 -- the card's own import is what is tested

    base = build_model()
    api = HfApi(token=OWNER)
    api.create_repo("me/small-base", exist_ok=True)
    base.push_to_hub("me/small-base", token=OWNER)
    bpe_tokenizer().push_to_hub("me/small-base", token=OWNER)
    partial = trained(base="me/small-base")
    for merged, repo_id in ((False, "me/small-rows"), (True, "me/small-merged")):
        partial.push_to_hub(repo_id, merged=merged, token=OWNER)
        code = re.search(r"```python\n(.*?)```", ModelCard.load(repo_id).text, re.DOTALL)[1]
        names: dict = {}
        exec(code, names)
        assert_same_logits(logits_of(names["model"], IDS), logits_of(partial.model, IDS))
        assert names["tokenizer"].tokenize("a<think>b") == ["a", "<think>", "b"]


@in_client
def test_card_that_somebody_wrote_stays():
    put("me/own-card", README__md=b"---\nlicense: mit\n---\n# Mine\n")
    trained().push_to_hub("me/own-card", token=OWNER)
    trained().push_to_hub("me/own-card", merged=True, token=OWNER)
    assert ModelCard.load("me/own-card").content == "---\nlicense: mit\n---\n# Mine\n"
    assert {ROWS_FILE, "model.safetensors"} <= files("me/own-card")


@in_client
def test_card_of_an_earlier_push_is_written_anew():
    trained(tokens=["<a>"]).push_to_hub("me/renewed", token=OWNER)
    trained(tokens=["<a>", "<b>"]).push_to_hub("me/renewed", token=OWNER)
    assert listed(ModelCard.load("me/renewed").text) == ["<a>", "<b>"]


@pytest.mark.parametrize("base", [None, "/home/me/secret folder/my-model", "../my-model", "a/b/c", "x\n---\n"])
def test_path_of_a_base_model_is_not_published_as_a_name(base):
    for card in (
        rows_card(["<a>"], {"input_rows": (1, 16)}, base_model=base, repo_id="me/x", file_bytes=1),
        merged_card(["<a>"], base_model=base, repo_id="me/x", model_class="LlamaForCausalLM"),
    ):
        assert "base_model" not in card.data.to_dict() and "secret" not in card.content
        assert "base_model:" not in card.content
        assert card.text.count("\n# ") == 1


def test_card_of_a_saved_folder_does_not_tell_where_it_was(tmp_path):
    trained().save_pretrained(tmp_path / "my-tokens")
    card = (tmp_path / "my-tokens" / "README.md").read_text("utf-8")
    assert str(tmp_path) not in card and "load_tokens(model, tokenizer, 'my-tokens', trainable=False)" in card


def test_folder_that_looks_like_a_name_is_not_published_as_one(tmp_path, monkeypatch):
    (tmp_path / "me" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    card = rows_card(["<a>"], {"input_rows": (1, 16)}, base_model="me/base", repo_id="me/x", file_bytes=1)
    assert "base_model" not in card.data.to_dict()


def test_card_of_many_tokens_is_cut_and_says_so():
    tokens = [f"<{number}>" for number in range(250)]
    card = rows_card(tokens, {"input_rows": (250, 16)}, base_model="gpt2", repo_id="me/x", file_bytes=1_234_567)
    assert len(listed(card.text)) == 100 and "\n- and 150 more\n" in card.text
    assert "# 250 trained token embeddings for <code>gpt2</code>" in card.text and "1,234,567 bytes" in card.text


def test_front_matter_is_plain_yaml():
    card = rows_card(["<a>"], {"input_rows": (1, 16)}, base_model="gpt2", repo_id="me/x", file_bytes=1)
    assert yaml.safe_load(str(card).split("---\n")[1]) == {
        "library_name": "hf_partial_embed",
        "tags": ["token-embeddings", "vocabulary-extension"],
        "base_model": "gpt2",
        "base_model_relation": "adapter",
    }


# What goes wrong, and what the message says


@in_client
def test_missing_repository_is_an_error_that_says_what_to_do():
    for token in (None, OWNER):
        with pytest.raises(PartialEmbeddingError) as caught:
            load_tokens(build_model(), bpe_tokenizer(), "me/nowhere", token=token)
        assert str(caught.value) == (
            "Cannot read rows from 'me/nowhere': there is no such folder here, and no repository of that name on the "
            "Hub that you can read. Check the name; for a private repository log in (`hf auth login`) or pass token=."
        )


@in_client
def test_gated_repository_is_an_error_that_says_how_to_get_in():
    trained().push_to_hub("me/gated", token=OWNER)
    HfApi(token=OWNER).update_repo_settings("me/gated", gated="manual")
    for token in (None, STRANGER):
        with pytest.raises(PartialEmbeddingError, match=r"'me/gated': .* is gated. Ask for access on its page, then"):
            TokenRows.from_pretrained("me/gated", token=token)
    assert len(TokenRows.from_pretrained("me/gated", token=OWNER)) == 3


@in_client
def test_missing_revision_is_an_error_that_names_it():
    trained().push_to_hub("me/one-branch", token=OWNER)
    with pytest.raises(PartialEmbeddingError, match=r"'me/one-branch': .* no branch, tag or commit 'v9'. Its page"):
        TokenRows.from_pretrained("me/one-branch", revision="v9")


@in_client
def test_repository_without_rows_is_an_error_that_names_the_file():
    put("me/model", config__json=b"{}")
    with pytest.raises(PartialEmbeddingError, match=r"'me/model': the Hub repository has no token_rows.safetensors."):
        TokenRows.from_pretrained("me/model")


@in_client
@pytest.mark.parametrize("source", ["../nowhere", "a/b/c", "/nowhere", "has spaces", "x" * 5000, "a\0b", ""])
def test_source_that_can_be_nothing_is_an_error(source):
    with pytest.raises(PartialEmbeddingError, match=r"no file or folder here, and no repository id|has no token_rows"):
        TokenRows.from_pretrained(source)


@in_client
@pytest.mark.parametrize("token", ["hf_wrong", "not ascii: ä", True])
def test_token_that_is_not_valid_is_an_error(token):
    trained().push_to_hub("me/public", token=OWNER)
    with pytest.raises(PartialEmbeddingError, match="Cannot read rows from 'me/public': "):
        TokenRows.from_pretrained("me/public", token=token)
    with pytest.raises(PartialEmbeddingError, match="Cannot push to 'me/public': "):
        trained().push_to_hub("me/public", token=token)


@in_client
@pytest.mark.parametrize(
    "data", [b"", b"<html>not found</html>", save({"x": torch.ones(2)})], ids=["empty", "no safetensors", "no rows"]
)
def test_damaged_row_file_on_the_hub_is_an_error_and_nothing_is_attached(data):
    put("me/damaged", token_rows__safetensors=data)
    model, tokenizer = build_model(), bpe_tokenizer()
    before = snapshot(model)
    with pytest.raises(PartialEmbeddingError):
        load_tokens(model, tokenizer, "me/damaged")
    assert len(tokenizer) == 300 and model.state_dict().keys() == before.keys()


@in_client
@pytest.mark.parametrize("repo_id", ["me/pushed-by", "somebody/pushed-by"])
def test_push_without_permission_is_an_error_that_says_how_to_get_it(repo_id):
    partial = trained()
    before = snapshot(partial.model)
    for token in (None, STRANGER) if repo_id == "me/pushed-by" else (None, OWNER):
        for merged in (False, True):
            with pytest.raises(PartialEmbeddingError, match=r"Cannot push to '.*/pushed-by': [^$]*log in \(`hf auth"):
                partial.push_to_hub(repo_id, token=token, merged=merged)
    after = partial.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    partial.verify()


@in_client
def test_push_of_a_stranger_without_a_pull_request_changes_nothing():
    trained(seed=1).push_to_hub("me/mine", token=OWNER)
    with pytest.raises(PartialEmbeddingError, match="Cannot push to 'me/mine': 403 Forbidden"):
        trained(seed=2).push_to_hub("me/mine", token=STRANGER)
    assert len(history("me/mine")) == 2


@in_client
def test_pull_request_against_another_branch_is_refused_before_anything_is_made():
    with pytest.raises(PartialEmbeddingError, match=r"revision='dev' cannot be had with it. Leave out one of them."):
        trained().push_to_hub("me/never-made", token=OWNER, create_pr=True, revision="dev")
    assert not HfApi(token=OWNER).repo_exists("me/never-made")


@in_client
def test_name_that_no_repository_can_have_is_an_error():
    with pytest.raises(PartialEmbeddingError, match=r"Cannot push to 'no repository': .* no repository id of the Hub"):
        trained().push_to_hub("no repository", token=OWNER)


def hang_up(handler) -> bool:
    return True


def fail(handler) -> bool:
    handler.send(500, {"error": "Internal Error"})
    return True


def answer_nonsense(handler) -> bool:
    handler.wfile.write(b"nonsense\r\n\r\n")
    return True


def answer_like_a_web_site(handler) -> bool:
    handler.send(200, b"<html>Please log in to the Wi-Fi</html>", {"Content-Type": "text/html"})
    return True


def break_off_downloads(handler) -> bool:
    if "signature" not in handler.path or handler.command != "GET":
        return False
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"half")
    return True


@pytest.mark.parametrize("fault", [hang_up, fail, answer_nonsense, answer_like_a_web_site, break_off_downloads])
def test_hub_that_breaks_down_is_an_error(server, client, fault):
    repo_id = f"me/{fault.__name__}"
    client(push_for_later, repo_id)
    with patch.object(server, "fault", fault):
        client(use_broken_hub, repo_id)


def test_rows_load_from_the_cache_while_the_hub_is_down(server, client):
    client(push_for_later, "me/cached")
    client(load_cached)
    with patch.object(server, "fault", fail):
        client(load_cached)


def push_for_later(repo_id: str) -> None:
    trained().push_to_hub(repo_id, token=OWNER)


def load_cached() -> None:
    assert equal(TokenRows.from_pretrained("me/cached"), trained().token_rows())


def use_broken_hub(repo_id: str) -> None:
    partial = trained(seed=2)
    with patch("time.sleep"):  # which huggingface_hub does before it tries again
        with pytest.raises(PartialEmbeddingError, match=f"Cannot read rows from '{repo_id}': "):
            TokenRows.from_pretrained(repo_id)
        if not repo_id.endswith("downloads"):
            with pytest.raises(PartialEmbeddingError, match=f"Cannot push to '{repo_id}': "):
                partial.push_to_hub(repo_id, token=OWNER)
            with pytest.raises(PartialEmbeddingError, match=f"Cannot read the checkpoint '{repo_id}': "):
                verify_checkpoint(repo_id, repo_id)


UNREACHABLE = """
import time
time.sleep = lambda seconds: None  # which huggingface_hub does before it tries again
import torch
from hf_partial_embed import PartialEmbeddingError, TokenRows, verify_checkpoint

rows = TokenRows(["<a>"], torch.ones(1, 2))
for call in (
    lambda: TokenRows.from_pretrained("me/rows"),
    lambda: verify_checkpoint("me/rows", "me/rows"),
    lambda: rows.push_to_hub("me/rows", token="hf_owner"),
):
    try:
        call()
    except PartialEmbeddingError as error:
        print(error)
"""


def test_hub_that_cannot_be_reached_is_an_error_that_says_so(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        variables = {**os.environ, **environment(f"http://127.0.0.1:{unused.getsockname()[1]}", tmp_path)}
        command = [sys.executable, "-c", UNREACHABLE]
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=variables).stdout
    reading, verifying, pushing = output.splitlines()
    reason = "the Hub cannot be reached, and the local cache has no copy."
    assert reading.startswith(f"Cannot read rows from 'me/rows': {reason}")
    assert verifying.startswith(f"Cannot read the checkpoint 'me/rows': {reason}")
    assert pushing.startswith("Cannot push to 'me/rows': ")
    assert all(line.endswith("Connection refused") for line in (reading, verifying, pushing))


@pytest.mark.skipif(not is_offline_mode(), reason="HF_HUB_OFFLINE is not set")
def test_offline_mode_is_named():
    with pytest.raises(PartialEmbeddingError, match=r"'me/rows': the Hub cannot be reached, .* `HF_HUB_OFFLINE`"):
        TokenRows.from_pretrained("me/rows")
    with pytest.raises(PartialEmbeddingError, match=r"Cannot push to 'me/rows': .* `HF_HUB_OFFLINE`"):
        trained().push_to_hub("me/rows", token=OWNER)
