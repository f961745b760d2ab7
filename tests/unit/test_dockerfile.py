"""What the Dockerfile says, as far as it can be read; tests/proof/test_dockerfile.py runs its steps."""

import re
import tomllib

from tests.dockerfile import ROOT, stages


def copied(stage) -> list[str]:
    return [name for word, rest in stage.steps if word == "COPY" and "--from" not in rest for name in rest.split()[:-1]]


def test_the_wheel_is_built_from_everything_that_it_needs():
    build, _ = stages()
    names = copied(build)
    for name in names:
        assert (ROOT / name).exists(), name
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    needed |= {project["tool"]["scikit-build"]["cmake"]["source-dir"]} | {"deepseek_fp4_plugin"}
    assert needed <= set(names)
    last = [rest for word, rest in build.steps if word == "RUN"][-1]
    assert "pip wheel" in last and "wheel.cmake=true" in last  # no pure-Python wheel without a word


def test_the_image_has_no_compiler_and_no_sources():
    build, image = stages()
    assert build.base == image.base  # the same Python and the same C++ runtime
    assert copied(image) == []
    runs = " ".join(rest for word, rest in image.steps if word == "RUN")
    assert not re.search(r"apt-get|g\+\+|gcc|cmake|build-essential", runs)
    order = [word for word, _ in image.steps]
    assert order.index("USER") > max(i for i, word in enumerate(order) if word in ("RUN", "COPY"))


def test_torch_is_the_makefiles():
    _, image = stages()
    wanted = re.search(r"torch==[\d.]+", (ROOT / "Makefile").read_text())
    assert wanted and any(wanted[0] in rest for word, rest in image.steps if word == "RUN")
