"""What a Hugging Face id becomes: which files are asked for, and what is said when they cannot be had."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.hub import is_small_file, resolve
from deepseek_fp4_plugin.checkpoint.reader import read_json
from deepseek_fp4_plugin.quantization.quantize import quantize_checkpoint
from tests.stops import SETTINGS, small_source

ID = "someone/Tiny-R1"
CODE = {
    "configuration_deepseek.py": (
        "from transformers import DeepseekV3Config as Original\n\n\nclass DeepseekV3Config(Original):\n    pass\n"
    ),
    "modeling_deepseek.py": "from .configuration_deepseek import DeepseekV3Config\n",
    "tokenization_extra.py": "# code\n",
}
OTHERS = {"LICENSE-MODEL": "a", "License": "b", "NOTICE": "c", "notice.md": "d", "merges.txt": "e", "spm.model": "f"}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A folder as it is published: with code, licences and what nobody needs."""
    folder = small_source(tmp_path_factory.mktemp("published") / "Tiny-R1")
    config = read_json(folder / "config.json")
    config["auto_map"] = {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoTokenizer": [None, "tokenization_extra.Fast"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name, text in {**CODE, **OTHERS, "weights.bin": "x", "picture.png": "x", "README.md": "# Tiny\n"}.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def hub(published, tmp_path, monkeypatch) -> Path:
    """A hub whose only repository is `published`, with its own filter of names. Returns the cache."""

    def snapshot_download(repo_id, *, revision=None, allow_patterns=None, local_files_only=False):
        target = tmp_path / "cache" / "snapshot"
        if local_files_only:
            raise LocalEntryNotFoundError("not here")
        target.mkdir(parents=True)
        for name in filter_repo_objects(sorted(p.name for p in published.iterdir()), allow_patterns=allow_patterns):
            shutil.copy(published / name, target / name)
        return str(target)

    def model_info(self, repo_id, **options):
        siblings = [SimpleNamespace(rfilename=p.name, size=p.stat().st_size) for p in published.iterdir()]
        return SimpleNamespace(siblings=siblings)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_result_of_an_id_is_the_result_of_its_folder(hub, published, tmp_path):
    transformers = pytest.importorskip("transformers")
    quantize_checkpoint(ID, tmp_path / "by-id" / "out", **SETTINGS)
    quantize_checkpoint(published, tmp_path / "by-folder" / "out", **SETTINGS)
    found, expected = (
        {path.name: path.read_bytes() for path in (tmp_path / way / "out").iterdir()} for way in ("by-id", "by-folder")
    )
    for name in ("README.md", "quantization_report.html", "quantization_report.json"):  # they name their source
        named, plain = found.pop(name), expected.pop(name)
        assert named != plain and named.replace(ID.encode(), b"Tiny-R1") == plain
    assert found == expected and {*CODE, *OTHERS} <= found.keys()
    assert not {"weights.bin", "picture.png"} & found.keys()
    config = transformers.AutoConfig.from_pretrained(tmp_path / "by-id" / "out", trust_remote_code=True)
    assert type(config).__module__.startswith("transformers_modules") and config.hidden_size == 64


def test_every_small_file_is_asked_for(hub, published):
    folder = resolve(ID)
    assert {p.name for p in folder.iterdir()} == {
        p.name
        for p in published.iterdir()
        if is_small_file(p.name) or p.suffix == ".safetensors" or p.name == "README.md"
    }


@pytest.mark.parametrize("absent", [["configuration_deepseek.py"], ["modeling_deepseek.py", "tokenization_extra.py"]])
def test_code_that_auto_map_names_and_nobody_has_is_said(published, tmp_path, caplog, absent):
    folder = tmp_path / "source"
    shutil.copytree(published, folder)
    for name in absent:
        (folder / name).unlink()
    quantize_checkpoint(folder, tmp_path / "out", **SETTINGS)
    for name in CODE:
        assert (f"names {name}, which is not there" in caplog.text) == (name in absent)


def test_code_of_another_repository_is_not_missed(published, tmp_path, caplog):
    folder = tmp_path / "source"
    shutil.copytree(published, folder)
    config = read_json(folder / "config.json")
    config["auto_map"] = {"AutoConfig": "deepseek-ai/DeepSeek-R1--configuration_elsewhere.DeepseekV3Config"}
    (folder / "config.json").write_text(json.dumps(config))
    quantize_checkpoint(folder, tmp_path / "out", **SETTINGS)
    assert "auto_map" not in caplog.text


def test_a_disk_too_small_for_the_download(hub, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"needs \d+\.\d (kB|MB) more and .* has 1\.0 kB free; set HF_HOME"):
        resolve(ID)


@pytest.mark.parametrize(
    "error", [ConnectionError("Connection broken:\nreset"), OSError(28, "No space left on device")]
)
def test_a_download_that_stops_is_one_sentence(hub, monkeypatch, error):
    def stop(*arguments, local_files_only=False, **options):
        raise LocalEntryNotFoundError("not here") if local_files_only else error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", stop)
    with pytest.raises(CheckpointError, match=r"download of someone/Tiny-R1 stopped \(.*\); run again") as raised:
        resolve(ID)
    assert "\n" not in str(raised.value)


def test_a_home_of_nobody():
    with pytest.raises(CheckpointError, match="~nobody-of-this-name/model: "):
        resolve("~nobody-of-this-name/model")
