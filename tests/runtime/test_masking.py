"""Nothing secret and no local folder is in what leaves the machine; what is neither stays as it is."""
from __future__ import annotations

from pathlib import Path

import pytest

from llmgr.data import fetch
from llmgr.runtime import console
from llmgr.runtime.masking import masked, masked_all

ADDRESSES = {
    "http://user:s3cret@host/data": "http://***@host/data",
    "http://user:s3/cr/et@host:8080/data": "http://***@host:8080/data",
    "postgresql+psycopg2://me:p%40s%2Fs3cret@db/mlflow": "postgresql+psycopg2://***@db/mlflow",
    "https://me@there:s3cret@@host/x": "https://***@host/x",
    "https://s3cret@host/x": "https://***@host/x",
    "https://user:s3 cret@host": "https://***@host",
    "https://user:#s3?cret@host/x?y=1": "https://***@host/x?y=1",
    "https://host/x?token=s3cret&part=2": "https://host/x?token=***&part=2",
    "https://host/x?X-Amz-Signature=s3cret&X-Amz-Security-Token=s3cret": "https://host/x?X-Amz-Signature=***"
                                                                      "&X-Amz-Security-Token=***",
    "https://host/x?sv=1&sig=s3cret%3D": "https://host/x?sv=1&sig=***",
    "Authorization: Bearer s3cret-s3cret": "Authorization: Bearer ***",
    "login with hf_s3crets3crets3cret failed": "login with hf_*** failed",
}
FOLDERS = {
    "/home/me/models/all-MiniLM-L6-v2": "…/all-MiniLM-L6-v2",
    "/home/me/My Models (old)/llama/": "…/llama",
    "~/models/llama": "…/llama",
    "sqlite:////home/me/mlflow.db": "sqlite:///…/mlflow.db",
    "file:///home/me/mlartifacts/1?x=2": "file:///…/1?x=2",
    "no config.json in '/home/me/models/llama': look": "no config.json in '…/llama': look",
    "a=/home/me/a,b=/home/me/b": "a=…/a,b=…/b",
    "C:\\Users\\me\\models\\llama": "…/llama",
}
PLAIN = ("https://host:8080/a/b/c.json.gz?part=2&title=key", "sentence-transformers/all-MiniLM-L6-v2", "models:/m-1/2",
         "and/or 3 / 4 samples/s", "../shared/amazon", "reports/metrics/cost/tune.json", "HR@20 0.1 [0.1, 0.2]",
         "tune.max_text_tokens=48, align.softmax=items", "<td>1</td></tr></table>", "https://medium.example/a/b")


@pytest.mark.parametrize(("text", "expected"), [*ADDRESSES.items(), *FOLDERS.items()])
def test_what_must_stay_here_is_masked(text: str, expected: str) -> None:
    assert masked(text) == masked(masked(text)) == expected
    within = masked(f"a line\nthe answer was {text}")
    assert within.startswith("a line\nthe answer was ")
    assert "cret" not in within.replace("s3 cret", "") and "/home" not in within and "Users" not in within


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_no_secret_stays(text: str) -> None:
    assert masked(text) == text


def test_masking_reaches_into_values_and_is_quick() -> None:
    assert masked_all({"/home/me/x": ["http://a:b@c", 3, None], "p": ("~/x/y",)}) == {
        "…/x": ["http://***@c", 3, None], "p": ["…/y"]}
    hostile = ["a://" * 30_000, "/a" * 60_000, "?token" * 20_000, "token=" * 20_000, "~" * 120_000, "a" * 120_000 + "://"]
    for text in hostile:
        masked(text)


def test_messages_keep_folders_and_hide_passwords(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    console.say(f"http://me:s3cret@host/x is not in {tmp_path}")
    assert capsys.readouterr().err == f"http://***@host/x is not in {tmp_path}\n"


def test_origins_of_data_are_masked() -> None:
    assert fetch.shown("https://me:se/cret@host:8080/data") == "https://***@host:8080/data"
    assert fetch.shown("/home/somebody/amazon") == "…/amazon"
