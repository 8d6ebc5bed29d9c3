"""What is published: the source archive, the metadata, extras, the configuration of wheels and the workflows."""

import importlib.util
import itertools
import re
import shlex
import shutil
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import t2t_fast
from support import ROOT
from support.building import (
    LIBRARY,
    build_wheel,
    copy_project,
    make_venv,
    make_wheelhouse,
    needs_operators,
    needs_pip,
    pip_install,
    python,
    run,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # a requirement of pytest there

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TABLE = PROJECT["project"]
VERSION = t2t_fast.__version__
FOLDERS = {".ci", ".github", "benchmarks", "build_support", "csrc", "docs", "examples", "t2t_fast", "tests"}
"""The folders that are packed into a source archive."""
LARGEST = 1_000_000
"""Bytes of a source archive."""


def packed(source, into):
    """The source archive of a folder."""
    result = python(source, "setup.py", "--quiet", "sdist", "--dist-dir", into)
    assert result.returncode == 0, result.stdout
    (archive,) = Path(into).glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of everything that an archive may take, with files that must stay outside."""
    folder = tmp_path_factory.mktemp("checkout") / "project"
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.is_file() and path.name not in (".git", "PKG-INFO"):
            shutil.copy(path, folder)
    for name in FOLDERS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name)
    for name in (
        ".venv/lib/x.py",
        "build/operators/a.o",
        "demo-report/report.html",
        "benchmarks/results/machine/rows.json",
        "docs/large.png",
        "t2t_fast/_ops.so",
        "t2t_fast/_build.json",
        "t2t_fast/__pycache__/a.cpython-311.pyc",
        "tests/golden/a.npz",
        "tests/.hypothesis/examples/a",
        "tests/.pytest_cache/README.md",
        "csrc/cpu/.ruff_cache/a",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.fixture(scope="module")
def archive(checkout):
    return packed(checkout, checkout.parent / "dist")


@pytest.fixture(scope="module")
def files(archive):
    """Relative name -> contents, of the archive's files."""
    with tarfile.open(archive) as members:
        kept = [member for member in members if member.isfile()]
        return {member.name.partition("/")[2]: members.extractfile(member).read() for member in kept}


class TestSourceArchive:
    def test_it_is_small(self, archive, files):
        largest = sorted(files, key=lambda name: -len(files[name]))[:5]
        assert archive.stat().st_size < LARGEST, f"leave more out in MANIFEST.in; the largest files: {largest}"

    def test_it_has_what_building_and_testing_need(self, files):
        single = ["setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "LICENSE", ".ci/run", "t2t_fast/py.typed"]
        kept = [ROOT / name for name in single]
        patterns = {"build_support": "*.py", "csrc": "*.*", "benchmarks": "*.py", "t2t_fast": "*.py", "tests": "*.py"}
        for folder, pattern in patterns.items():
            kept += (ROOT / folder).rglob(pattern)
        for pattern in ("*.md", "docs/*.md", "tests/golden/*.json", ".github/*/*.yml"):
            kept += ROOT.glob(pattern)
        names = {path.relative_to(ROOT).as_posix() for path in kept if path.is_file()}
        assert not {name for name in names if not name.startswith("tests/benchmarks/")} - set(files)

    def test_it_has_nothing_else(self, files):
        top = {name.partition("/")[0] for name in files}
        single = {path.name for path in ROOT.iterdir() if path.is_file()} | {"PKG-INFO", "setup.cfg", "MANIFEST.in"}
        assert top <= FOLDERS | {"t2t_fast.egg-info"} | single
        for name in files:
            assert not re.search(r"\.(so|o|pyc|npz|png)$|(^|/)(__pycache__|_build\.json)|cache/|\.hypothesis", name), (
                name
            )
            assert not name.startswith(("benchmarks/results/", "tests/benchmarks/")), name

    def test_no_path_of_this_machine(self, files):
        for place in {str(ROOT), sys.prefix}:
            assert not [name for name, text in files.items() if place.encode() in text], place

    @pytest.mark.slow
    def test_an_unpacked_archive_skips_what_it_lacks(self, archive, tmp_path):
        """The tests that read left-out files skip with a reason, and links to them are accepted."""
        shutil.unpack_archive(archive, tmp_path, filter="data")
        (folder,) = tmp_path.iterdir()
        tests = ["tests/models/test_golden.py", "tests/test_readme.py", "tests/interop/test_checkpoint_names.py"]
        chosen = "official_block-reference or link_targets or paths_in or layout or gate"
        result = python(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *tests)
        assert result.returncode == 0, result.stdout
        assert "leaves the files of this test out" in result.stdout
        assert "passed" in result.stdout


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The archive of a project whose operators have no kernels."""
    folder = tmp_path_factory.mktemp("small")
    return packed(copy_project(folder / "project", kernels=False, module=False), folder)


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    wheels = make_wheelhouse(tmp_path_factory.mktemp("offline") / "wheels", "setuptools", "pybind11")
    return {"PIP_FIND_LINKS": wheels}


@needs_pip
class TestBuildsOfTheArchive:
    """The README's installation, from an archive and isolated."""

    @pytest.mark.slow
    @pytest.mark.parametrize("mode", ["none", pytest.param("auto", marks=needs_operators)])
    def test_isolated_installation(self, small, offline, tmp_path, mode):
        user = make_venv(tmp_path, sysconfig.get_path("purelib"))
        result = pip_install(user, small, "-v", T2T_FAST_BUILD=mode, CUDA_HOME="/nowhere", **offline)
        printed = {"none": "pure Python, nothing native is built", "auto": "and the operators for the CPU with PyTorch"}
        assert printed[mode] in result.stdout
        package = Path(run("/", user, "-c", "import t2t_fast; print(*t2t_fast.__path__)").stdout.strip())
        assert package.is_relative_to(tmp_path)
        assert (package / LIBRARY).exists() == (mode != "none")


def test_twine_accepts_archive_and_wheel(archive, checkout, tmp_path):
    """The README renders, and the metadata is complete."""
    pytest.importorskip("twine")
    wheel = build_wheel(checkout, tmp_path, T2T_FAST_BUILD="none")
    result = python(tmp_path, "-m", "twine", "check", "--strict", archive, wheel)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("PASSED") == 2


@pytest.fixture(scope="module")
def native_wheel(archive):
    """The archive's wheel with the CPU operators."""
    return build_wheel(archive, archive.parent / "native", T2T_FAST_BUILD="cpu")


def wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


@needs_pip
class TestWheels:
    @pytest.mark.slow
    @needs_operators
    def test_the_same_sources_give_the_same_wheel(self, tmp_path):
        """Bit by bit, built in two folders at two times, with ``SOURCE_DATE_EPOCH``."""
        wheels = []
        for name in ("one", "another/place"):
            project = copy_project(tmp_path / name / "project", kernels=False)
            variables = {"T2T_FAST_BUILD": "cpu", "SOURCE_DATE_EPOCH": "1700000000"}
            wheels.append(build_wheel(project, tmp_path / name / "wheels", **variables))
        first, second = (wheel.read_bytes() for wheel in wheels)
        assert first == second
        with zipfile.ZipFile(wheels[0]) as archive:
            assert {info.date_time[:3] for info in archive.infolist()} == {(2023, 11, 14)}
            libraries = [archive.read(name) for name in archive.namelist() if name.endswith(".so")]
        assert len(libraries) == 2
        assert not [
            place for place in (ROOT, tmp_path, sys.prefix) for each in libraries if str(place).encode() in each
        ]

    @pytest.mark.slow
    @needs_operators
    def test_a_local_version_says_what_is_inside(self, tmp_path):
        project = copy_project(tmp_path / "project", kernels=False, module=False)
        wheel = build_wheel(project, tmp_path / "wheels", T2T_FAST_BUILD="cpu", T2T_FAST_LOCAL_VERSION="cpu")
        assert wheel.name.startswith(f"t2t_fast-{VERSION}+cpu-cp")
        assert wheel_metadata(wheel)["Version"] == f"{VERSION}+cpu"
        with zipfile.ZipFile(wheel) as archive:
            libraries = {name for name in archive.namelist() if name.endswith(".so")}
        assert f"t2t_fast/{LIBRARY}" in libraries

    @pytest.mark.parametrize(
        ("label", "mode", "expected"),
        [
            ("cu130", "none", "T2T_FAST_LOCAL_VERSION=cu130: this build has no operators: pure Python"),
            ("gpu", "none", "T2T_FAST_LOCAL_VERSION must be like cpu or cu130, got 'gpu'"),
            pytest.param(
                "cu130",
                "cpu",
                "T2T_FAST_LOCAL_VERSION=cu130: this build has operators that are cpu: built t2t_fast._C and",
                marks=[needs_operators, pytest.mark.slow],
            ),
        ],
    )
    def test_a_wrong_local_version_is_refused(self, tmp_path, label, mode, expected):
        project = copy_project(tmp_path / "project", kernels=False, module=False)
        variables = {"T2T_FAST_BUILD": mode, "T2T_FAST_LOCAL_VERSION": label}
        result = python(project, "setup.py", "bdist_wheel", "--dist-dir", tmp_path / "wheels", **variables)
        assert result.returncode != 0
        assert expected in result.stdout
        assert not list(tmp_path.glob("wheels/*"))

    @pytest.mark.slow
    def test_a_pure_wheel_works_for_its_user(self, checkout, tmp_path):
        self.check_installed(build_wheel(checkout, tmp_path / "wheels", T2T_FAST_BUILD="none"), tmp_path, "pure")

    @pytest.mark.slow
    @needs_operators
    def test_a_native_wheel_works_for_its_user(self, native_wheel, tmp_path):
        self.check_installed(native_wheel, tmp_path, "native")

    @pytest.mark.slow
    @needs_operators
    @pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed here")
    def test_the_operators_need_only_libtorch_and_the_system(self, native_wheel, tmp_path):
        """So that nothing has to be bundled; without a recorded path the user's PyTorch is found."""
        with zipfile.ZipFile(native_wheel) as contents:
            contents.extract(f"t2t_fast/{LIBRARY}", tmp_path)
        dynamic = run(tmp_path, "readelf", "-d", tmp_path / "t2t_fast" / LIBRARY).stdout
        system = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2"}
        assert set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)) - system == {"libtorch.so"}
        assert "RPATH" not in dynamic and "RUNPATH" not in dynamic

    @staticmethod
    def check_installed(wheel, folder, kind):
        user = make_venv(folder, sysconfig.get_path("purelib"))
        pip_install(user, wheel)
        result = run("/", user, ROOT / "tests" / "support" / "installed.py", kind, OMP_NUM_THREADS="1")
        assert result.returncode == 0, result.stdout
        assert f"{kind}, swapped 10 modules" in result.stdout


def versions(classifiers):
    return [
        found[1] for name in classifiers if (found := re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", name))
    ]


SUPPORTED = versions(TABLE["classifiers"])


class TestMetadata:
    def test_pythons_agree(self):
        """Classifiers, requires-python, the README's table, the wheels and the workflow's matrix."""
        row = re.search(r"^\| Python \| (\S+) or newer \| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
        assert row[2].split(", ") == SUPPORTED
        assert TABLE["requires-python"] == f">={row[1]}" == f">={SUPPORTED[0]}"
        assert workflows()["tests.yml"]["jobs"]["test"]["strategy"]["matrix"]["python"] == SUPPORTED
        wheels = [f"cp{version.replace('.', '')}-*" for version in SUPPORTED]
        assert set(wheels) <= set(PROJECT["tool"]["cibuildwheel"]["build"])

    def test_pytorchs_agree(self):
        (torch,) = [Requirement(text) for text in TABLE["dependencies"] if text.startswith("torch")]
        oldest = re.search(r"^\| PyTorch \| (\S+) or newer \|", (ROOT / "README.md").read_text(), re.MULTILINE)[1]
        assert torch.specifier == SpecifierSet(f">={oldest}")
        matrix = workflows()["tests.yml"]["jobs"]["test"]["strategy"]["matrix"]["torch"]
        assert matrix == [f"torch=={oldest}.*", f"torch>={oldest}"]
        assert f"torch=={oldest}.*" in PROJECT["tool"]["cibuildwheel"]["before-build"]

    def test_the_license_is_an_spdx_expression(self, archive):
        with tarfile.open(archive) as members:
            (info,) = [name for name in members.getnames() if re.fullmatch(r"[^/]+/PKG-INFO", name)]
            fields = Parser().parsestr(members.extractfile(info).read().decode())
        modern = int(metadata.version("setuptools").split(".")[0]) >= 77
        assert fields["License-Expression" if modern else "License"] == "BSD-3-Clause"
        assert fields.get_all("License-File") == ["LICENSE"]
        assert not [name for name in TABLE["classifiers"] if name.startswith("License ::")]

    def test_changelog_citation_and_readme_have_this_version(self):
        headings = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
        assert headings[0] in ("Unreleased", VERSION)
        assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text()
        assert f"version = {{{VERSION}}}" in (ROOT / "README.md").read_text()


EXTRAS = TABLE["optional-dependencies"]


def expanded(extra):
    """The requirements of an extra, with those of the extras that it names."""
    for requirement in map(Requirement, EXTRAS[extra]):
        if requirement.name == TABLE["name"]:
            yield from itertools.chain.from_iterable(map(expanded, sorted(requirement.extras)))
        else:
            yield requirement


class TestExtras:
    @pytest.mark.parametrize("extra", EXTRAS)
    def test_an_extra_is_consistent(self, extra):
        """Its names resolve, it has lower bounds only, and what is installed here satisfies it."""
        for requirement in expanded(extra):  # KeyError: an extra names an unknown one
            assert {bound.operator for bound in requirement.specifier} <= {">="}, requirement
            try:
                installed = metadata.version(requirement.name)
            except metadata.PackageNotFoundError:
                continue
            assert requirement.specifier.contains(installed, prereleases=True), f"{requirement}, installed {installed}"

    def test_the_test_extra_has_all_others(self):
        everything = {requirement.name for extra in EXTRAS for requirement in expanded(extra)}
        assert {requirement.name for requirement in expanded("test")} == everything


def workflows():
    yaml = pytest.importorskip("yaml")
    return {path.name: yaml.safe_load(path.read_text()) for path in sorted((ROOT / ".github" / "workflows").iterdir())}


def jobs():
    return [pytest.param(name, job, id=f"{name}-{job}") for name, jobs in JOBS.items() for job in jobs]


JOBS = {"tests.yml": ["lint", "test", "gate"], "wheels.yml": ["sdist", "cpu", "pure", "publish"]}
OUTSIDE = {"pip", "cibuildwheel"}
"""Modules that a workflow installs or finds, which the `test` extra need not have."""


class TestWorkflows:
    def test_files_and_jobs(self):
        assert {name: list(flow["jobs"]) for name, flow in workflows().items()} == JOBS

    @pytest.mark.parametrize("name", JOBS)
    def test_the_least_permissions(self, name):
        flow = workflows()[name]
        assert flow["permissions"] == {"contents": "read"}
        assert flow["concurrency"]["group"]
        assert "pull_request_target" not in flow[True], "YAML 1.1 reads the key `on` as true"
        allowed = {"publish": {"id-token": "write"}}
        for job, content in flow["jobs"].items():
            assert content.get("permissions") == allowed.get(job)

    @pytest.mark.parametrize(("name", "job"), jobs())
    def test_steps(self, name, job):
        content = workflows()[name]["jobs"][job]
        assert 0 < content["timeout-minutes"] <= 180
        for step in content["steps"]:
            assert ("uses" in step) != ("run" in step)
            if "uses" in step:
                assert re.fullmatch(r"(actions|pypa)/[\w-]+@(v\d+|[0-9a-f]{40}|release/v1)", step["uses"])
                if step["uses"].startswith("actions/checkout"):
                    assert step["with"]["persist-credentials"] is False
            else:
                self.check_command(step["run"])

    @staticmethod
    def check_command(command):
        """One simple command that exists; values of the event are not pasted into it."""
        assert "${{" not in command and "\n" not in command.strip(), command
        words = shlex.split(command, comments=True)
        if words[0] == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert len(words) == 2 and words[1] in targets, command
        elif words[0] == ".ci/run":
            assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
        elif words[:2] == ["python", "-m"]:
            assert words[2] in OUTSIDE or importlib.util.find_spec(words[2]) is not None, command
            if words[2] in ("build", "twine"):
                assert words[2] in {requirement.name for requirement in expanded("test")}
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), command
        else:
            assert words[0] in ("echo", "test"), command

    def test_only_a_tag_is_uploaded_and_only_what_the_index_accepts(self):
        publish = workflows()["wheels.yml"]["jobs"]["publish"]
        assert "github.event_name == 'push'" in publish["if"] and "refs/tags/v" in publish["if"]
        assert publish["environment"] and set(publish["needs"]) == {"sdist", "cpu", "pure"}
        (download,) = [step for step in publish["steps"] if "download" in step.get("uses", "")]
        assert download["with"]["pattern"] == "index-*"
        text = (ROOT / ".github" / "workflows" / "wheels.yml").read_text()
        assert "LOCAL_VERSION" not in text, "the index refuses local versions"
        assert re.findall(r"name: (index-\S+)", text).count("index-wheels") == 1
        assert "password" not in str(publish), "trusted publishing needs none"


class TestCibuildwheel:
    SETTINGS = PROJECT["tool"]["cibuildwheel"]

    def test_its_options_are_known(self):
        """cibuildwheel reads the table; it refuses unknown options."""
        if importlib.util.find_spec("cibuildwheel") is None:
            pytest.skip("cibuildwheel is not installed here")
        command = ["-m", "cibuildwheel", "--platform", "linux", "--archs", "x86_64", "--print-build-identifiers", ROOT]
        result = python(ROOT, *command)
        assert result.returncode == 0, result.stdout
        expected = [f"{each.removesuffix('-*')}-manylinux_x86_64" for each in self.SETTINGS["build"]]
        assert result.stdout.split() == expected

    def test_it_tests_the_wheel_and_bundles_no_pytorch(self):
        script = re.search(r"\{project\}/(\S+)", self.SETTINGS["test-command"])[1]
        assert (ROOT / script).is_file()
        repair = shlex.split(self.SETTINGS["linux"]["repair-wheel-command"])
        assert "libtorch*.so" in repair and repair[-3:] == ["-w", "{dest_dir}", "{wheel}"]
        assert self.SETTINGS["environment"]["T2T_FAST_BUILD"] == "cpu", (
            "a wheel without operators must not be published"
        )
