"""What is compiled, for which GPUs, by which compiler; and what is said of it."""

import subprocess

import pytest
from builds import toolchain

NVCC = """#!/bin/sh
for arch in 75 80 86 90 100 120; do echo compute_$arch; done
"""
DRIVER = """
extern "C" int cuInit(unsigned) { return %(fails)d; }
extern "C" int cuDeviceGetCount(int* count) { *count = %(count)d; return 0; }
extern "C" int cuDeviceGetAttribute(int* value, int attribute, int device) {
    static const int capabilities[] = {%(capabilities)s 0};
    *value = attribute == 75 ? capabilities[device] / 10 : attribute == 76 ? capabilities[device] %% 10 : -1;
    return 0;
}
"""


@pytest.fixture(autouse=True)
def nothing_is_asked(monkeypatch):
    for name in ("CC", "CXX", "FUSEDOPT_CUDA_ARCHS", "MAX_JOBS", "NVCC_CCBIN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def nvcc(tmp_path):
    (tmp_path / "nvcc").write_text(NVCC)
    (tmp_path / "nvcc").chmod(0o755)
    return str(tmp_path / "nvcc")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Makes this a machine with GPUs: it has a driver that says so."""
    load = toolchain.ctypes.CDLL

    def having(*capabilities, fails=0):
        told = {"fails": fails, "count": len(capabilities), "capabilities": "".join(f"{c}, " for c in capabilities)}
        (tmp_path / "driver.cpp").write_text(DRIVER % told)
        library = tmp_path / f"libcuda_{len(list(tmp_path.iterdir()))}.so"
        command = [toolchain.compiler(), "-shared", "-fPIC", tmp_path / "driver.cpp", "-o", library]
        subprocess.run(command, check=True)
        monkeypatch.setattr(toolchain.ctypes, "CDLL", lambda name: load(str(library)))

    return having


def test_the_gpus_of_this_machine_are_compiled_for(machine, nvcc):
    machine(90, 80, 90)
    assert toolchain.gpus() == {80, 90} and toolchain.cuda_archs(nvcc) == [80, 90]


def test_newer_gpus_get_code_that_the_driver_translates(machine, nvcc):
    machine(103, 121)
    assert toolchain.cuda_archs(nvcc) == [100, 120]


@pytest.mark.parametrize("fails", [0, 100])
def test_no_gpu(machine, nvcc, fails):
    machine(*([90] if fails else []), fails=fails)
    with pytest.raises(RuntimeError, match="no NVIDIA GPU was seen.*FUSEDOPT_CUDA_ARCHS=all"):
        toolchain.cuda_archs(nvcc)


def test_a_gpu_that_is_too_old(machine, nvcc, capfd):
    machine(61)
    with pytest.raises(RuntimeError, match="of compute capability 6.1 is none that this nvcc has: 75, 80"):
        toolchain.cuda_archs(nvcc)
    machine(90, 61)
    assert toolchain.cuda_archs(nvcc) == [90] and "compute capability 6.1 is none" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("asked", "archs"),
    [
        ("all", [75, 80, 86, 90, 100, 120]),
        ("90", [90]),
        ("9.0, 80", [80, 90]),
        ("8.6;12.0", [86, 120]),
        ("90 90", [90]),
    ],
)
def test_what_is_asked_for_is_compiled(nvcc, monkeypatch, asked, archs):
    monkeypatch.setenv("FUSEDOPT_CUDA_ARCHS", asked)
    assert toolchain.cuda_archs(nvcc) == archs


@pytest.mark.parametrize(("asked", "wrong"), [("hopper", "hopper"), ("90 999", "999"), ("all 90", "all"), ("89", "89")])
def test_what_nvcc_has_not_is_refused(nvcc, monkeypatch, asked, wrong):
    monkeypatch.setenv("FUSEDOPT_CUDA_ARCHS", asked)
    with pytest.raises(RuntimeError, match=rf"FUSEDOPT_CUDA_ARCHS has {wrong}; this nvcc has 75, 80.*'all'"):
        toolchain.cuda_archs(nvcc)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"CXX": "clang++", "CC": "gcc"}, "clang++"),
        ({"CC": "gcc"}, "g++"),
        ({"CC": "cc"}, "c++"),
        ({"CC": "/usr/bin/x86_64-linux-gnu-gcc-12"}, "/usr/bin/x86_64-linux-gnu-g++-12"),
        ({"CC": "ccache clang-18 -m64"}, "ccache clang++-18 -m64"),
        ({"CC": "/opt/gcc-13/bin/gcc"}, "/opt/gcc-13/bin/g++"),
        ({"CC": "icx"}, "icpx"),
        ({"CC": "clang++-18"}, "clang++-18"),
        ({"CXX": "  ", "CC": " g++ "}, "g++"),
        ({}, None),
    ],
    ids=str,
)
def test_the_compiler_is_the_one_that_is_asked_for(monkeypatch, asked, found):
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    assert toolchain.asked_compiler() == found


def test_a_c_compiler_that_is_not_known(monkeypatch):
    monkeypatch.setenv("CC", "tcc")
    with pytest.raises(RuntimeError, match="CC is 'tcc', of which none is known; set CXX"):
        toolchain.compiler()


def test_an_nvcc_that_says_nothing(tmp_path):
    (tmp_path / "nvcc").write_text("#!/bin/sh\necho 'nvcc fatal: unknown option' >&2; exit 1")
    (tmp_path / "nvcc").chmod(0o755)
    with pytest.raises(RuntimeError, match="does not say which GPUs it compiles for: nvcc fatal: unknown option"):
        toolchain.cuda_archs(str(tmp_path / "nvcc"))


@pytest.mark.parametrize("has", [False, True])
def test_machine_code_is_compressed_where_nvcc_can(tmp_path, has):
    (tmp_path / "nvcc").write_text(f"#!/bin/sh\necho '{'--compress-mode [size]' if has else '--help'}'")
    (tmp_path / "nvcc").chmod(0o755)
    assert toolchain.compression(str(tmp_path / "nvcc")) == ("--compress-mode=size" if has else "")


def test_nvcc_takes_the_compiler_too(monkeypatch):
    assert toolchain.host_compiler() == ""
    monkeypatch.setenv("CC", "gcc-12")
    assert toolchain.host_compiler() == "-ccbin g++-12"
    monkeypatch.setenv("CXX", "ccache g++-13 -m64")
    assert toolchain.host_compiler() == "-ccbin g++-13"
    monkeypatch.setenv("NVCC_CCBIN", "g++-11")
    assert toolchain.host_compiler() == ""


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("a.h:1: warning: b\n  1 | error: c\na.h:2:3: error: d\nerror: e\n", "a.h:2:3: error: d"),
        ("g++: fatal error: Killed signal terminated program cc1plus\n", None),
        ("nvcc fatal   : Unsupported gpu architecture 'compute_30'\n", None),
        ('adam.cu(12): error: identifier "x" is undefined\n', None),
        ("/usr/bin/ld: cannot find -lgomp\ncollect2: error: ld\n", "/usr/bin/ld: cannot find -lgomp"),
        ("a.o: in `f':\na.cpp:1: undefined reference to `g'\nld: error: b\n", "a.cpp:1: undefined reference to `g'"),
        ("In file included from /a/error/b:1:\nc: warning: unused 'fatal'\nc:1: error: d\n", "c:1: error: d"),
        ("ld: a.o: relocation x can not be used\ncollect2: error: ld\n", "ld: a.o: relocation x can not be used"),
        ("collect2: fatal error: ld terminated\n", None),
        ("\nsh: 1: nvcc: not found\n", "sh: 1: nvcc: not found"),
    ],
)  # fmt: skip
def test_the_first_error(output, told):
    lines = ["[1/9] a.o\n", "FAILED: [code=1] b.o\n", "g++ -c b.cpp\n", *output.splitlines(keepends=True)]
    later = ["[2/9] c.o\n", "error: of another\n", "ninja: build stopped: subcommand failed.\n"]
    assert toolchain.Ninja.reason(lines + later) == (told or output.strip())


def test_an_error_of_ninja_itself():
    assert toolchain.Ninja.reason(["ninja: error: 'a.cpp' missing\n"]) == "ninja: error: 'a.cpp' missing"


def test_progress_is_said_as_it_is_made(tmp_path, capfd):
    source = tmp_path / "a.cpp"
    source.write_text("int f() { return 1; }\n")
    ninja = toolchain.Ninja(toolchain.compiler(), tmp_path / "build", "-shared")
    ninja.link([ninja.compile(source, "a", "-fPIC")], tmp_path / "a.so")
    assert ninja.steps == 2
    ninja.run(aloud=True)
    said = capfd.readouterr()
    assert not said.out and [line[: len("fusedopt: [1/2] ")] for line in said.err.splitlines()] == [
        "fusedopt: [1/2] ",
        "fusedopt: [2/2] ",
    ]
    ninja.run()
    assert not capfd.readouterr().err


@pytest.mark.parametrize("jobs", ["two", "-1"])
def test_jobs_are_a_number(monkeypatch, jobs):
    monkeypatch.setenv("MAX_JOBS", jobs)
    with pytest.raises(RuntimeError, match=f"MAX_JOBS is '{jobs}'"):
        toolchain.jobs()
