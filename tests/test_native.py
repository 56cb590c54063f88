"""The compiled CPU kernel: its results against the formula, and how it is compiled."""

import errno
import fcntl
import logging
import os
import re
import shlex
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from aaconv import AugmentedConv, attention_2d, functional
from aaconv.backends import native, native_build

import reference
from app import App, run_app
from helpers import (
    ROOT,
    assert_rounded,
    check_operations,
    gradient_of_one,
    inputs,
    inputs_like,
    laid_out,
    machine_lacks,
    rounding_errors,
    slow,
    thorough,
    with_gradients,
)

# (H, W), heads, dkh, dvh, batch. The kernel's tiles have 64 queries and keys; its vectors 16 or 8.
CASES = [
    ((1, 1), 1, 1, 1, 2),
    ((1, 67), 1, 2, 1, 1),
    ((67, 1), 1, 1, 2, 1),
    ((5, 3), 2, 3, 5, 2),
    ((7, 11), 1, 20, 2, 1),
    thorough((13, 11), 1, 7, 3, 1),
    slow((4, 4), 3, 64, 17, 2),
]


@pytest.fixture(autouse=True)
def compiled():
    if isinstance(native_build.load(), native_build.UnavailableError):
        machine_lacks(f"the kernel {native_build.load()}")


def by_kernel(*tensors):
    return attention_2d(*tensors, backend="native")


def single(tensors):
    return inputs_like(tensors, torch.float32)


def check(tensors, formula=reference.attention):
    """Check the output and the gradients against those of ``formula`` in float64."""
    exact = with_gradients(formula, inputs_like(tensors, torch.float64))
    assert_rounded(with_gradients(by_kernel, tensors), exact, rounding_errors(tensors))


def naive(*tensors):
    """The reference backend, which other tests check pair by pair."""
    return attention_2d(*tensors, backend="reference")


@pytest.mark.parametrize(("size", "heads", "dkh", "dvh", "batch"), CASES)
@pytest.mark.parametrize("relative", [True, False])
def test_equals_the_formula_with_gradients(size, heads, dkh, dvh, batch, relative):
    check(single(inputs(size, heads, dkh, dvh, batch=batch)[: 5 if relative else 3]))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(17, 19), (32, 32), (9, 70)])
def test_equals_the_formula_on_large_maps(size):
    check(single(inputs(size, 2, 20, 3, batch=1)), naive)


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous_format", "every other"])
def test_strides_are_as_they_come(layout, dtype):
    # The kernel computes in float32; half types only add the rounding of the result.
    check(laid_out(inputs_like(inputs((3, 7), 2, 6, 4), dtype), layout))


@pytest.mark.parametrize("dtype", native.DTYPES)
def test_strides_may_be_zero(dtype):
    q, k, v, *tables = inputs_like(inputs((3, 7), 2, 6, 4), dtype)
    views = [t.detach()[:1, :, :, :1].expand_as(t).requires_grad_() for t in (q, k, v)]
    check([*views, *tables])


def test_half_precision_has_all_its_numbers():
    """All bit patterns: subnormal numbers, the largest ones, infinities and NaNs."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        value = bits.view(dtype)[:, None, None, None, None]  # a batch of one-pixel images
        got = by_kernel(torch.zeros_like(value), torch.zeros_like(value), value)
        assert torch.equal(got.isnan(), value.isnan())
        assert torch.equal(got[~got.isnan()], value[~value.isnan()])


def test_the_powers_are_right_to_the_last_bits():
    """With two keys with the logits 0 and -x, the second has the weight 1 / (1 + e^x)."""
    x = torch.linspace(0, 4, 1001)
    k = torch.stack((torch.zeros(1001), -x), dim=1)[:, None, None, :, None]  # a batch of 1001
    v = torch.tensor([0.0, 1.0]).expand(1001, 2)[:, None, None, :, None]
    got = by_kernel(torch.ones_like(k), k, v)[:, 0, 0, 0, 0].double()
    exact = 1 / (1 + x.double().exp())
    # Rounding errors: three of x (log2(e), the query, the product), then the power's polynomial
    # with its five steps, the total, its reciprocal and the output.
    assert ((got - exact).abs() <= (3 * x + 9) * 2**-24 * exact).all()


@pytest.mark.parametrize("shape", [(0, 2, 3, 5), (2, 2, 0, 5), (2, 2, 3, 0)])
def test_the_kernel_itself_takes_empty_maps(shape):
    """An exported program calls it without checking first whether there are any positions."""
    q, k = torch.randn(2, *shape, 4).unbind()
    v = torch.randn(*shape, 3, requires_grad=True)
    out = native.attend(q, k, v, None, None)
    assert out.shape == (*shape, 3)
    out.sum().backward()
    assert v.grad.shape == v.shape


def test_the_bits_do_not_depend_on_the_number_of_threads():
    tensors = single(inputs((9, 13), 3, 8, 4))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(with_gradients(by_kernel, tensors))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("index", range(3))
def test_what_is_no_number_is_not_hidden(bad, index):
    tensors = [t.detach() for t in single(inputs((5, 7), 1, 8, 4, batch=1))]
    tensors[index][0, 0, 2, 3, 1] = bad
    ours, plain = (attention_2d(*tensors, backend=backend) for backend in ("native", "reference"))
    assert torch.equal(ours.isfinite(), plain.isfinite())
    assert not ours.isfinite().all()


@pytest.mark.parametrize("index", range(5))
def test_each_input_alone_has_its_gradient(index):
    got, expected = gradient_of_one(by_kernel, single(inputs((3, 5), 2, 6, 4)), index)
    assert torch.equal(got, expected)


# torch 2.14's opcheck itself reads .grad of non-leaf tensors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 5])
def test_the_operations_pass_opcheck(count):
    check_operations("native", single(inputs((3, 2), 2, 6, 4))[:count])


# A warning from torch itself.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["aot_eager", thorough("inductor")])
def test_compiled_and_exported(kind):
    layer = AugmentedConv(4, 8, 3, 6, 4, 2, (3, 5), True, backend="native")
    x = torch.randn(2, 4, 3, 5, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend=kind)
    wanted = [x, *layer.parameters()]
    for a, b in zip(
        (compiled(x), *torch.autograd.grad(compiled(x).square().sum(), wanted)),
        (layer(x), *torch.autograd.grad(layer(x).square().sum(), wanted)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(layer, (x.detach(),), dynamic_shapes=({0: batch},))
    other = torch.randn(7, 4, 3, 5)
    torch.testing.assert_close(program.module()(other), layer(other))


# ---- Compiling ----------------------------------------------------------------------------------


# Calls the real compiler, but reuses the object file if the arguments are the same. These tests are
# about when the kernel is compiled; without optimization, that takes a fraction of the time.
COMPILE_ONCE = """
case "$*" in
  *" -c "*)
    for object; do :; done
    words="$*"
    kept={objects}/$(echo "${{words% -o *}}" | sed s/-DOTHER// | md5sum | cut -c 1-32)
    [ -f $kept ] || {{ {real} "$@" -O0 && cp $object $kept; }} && cp $kept $object;;
  *) exec {real} "$@";;
esac
"""


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory):
    objects = tmp_path_factory.mktemp("objects")
    real = shlex.join(native_build._compiler())
    return fake_compiler(objects, COMPILE_ONCE.format(objects=objects, real=real))


@pytest.fixture
def cache(monkeypatch, tmp_path, compile_once):
    """An empty cache folder for compiled kernels, separate from that of the other tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", compile_once)
    monkeypatch.setattr(native_build, "load", native_build.load.__wrapped__)
    return tmp_path / "cache" / "aaconv"


@pytest.fixture(scope="module")
def built(tmp_path_factory, compile_once):
    """A compiled kernel as stored in the cache."""
    folder = tmp_path_factory.mktemp("built")
    native_build._build([compile_once], native_build._name([compile_once]), folder)
    (path,) = folder.glob("*.so")
    return path


def kept(cache):
    return sorted(path.name for path in cache.glob("*.so"))


def programs(folder):
    """Return files other than kernels and the lock; any would be left over from a build."""
    return [path for path in folder.iterdir() if path.suffix != ".so" and path.name != "lock"]


def fake_compiler(folder, script):
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.slow
def test_it_is_compiled_once(cache, monkeypatch):
    native_build.load()
    (name,) = kept(cache)
    assert re.fullmatch(r"native-[0-9a-f]{24}-[0-9a-f]{24}\.so", name)
    before = (cache / name).stat()
    assert before.st_mode & 0o777 == 0o700
    assert cache.stat().st_mode & 0o777 == 0o700
    native_build.load()
    assert (cache / name).stat().st_mtime_ns == before.st_mtime_ns
    assert not programs(cache)
    monkeypatch.setattr(native_build, "FLAGS", (*native_build.FLAGS, "-DOTHER"))
    native_build.load()
    assert len(kept(cache)) == 2
    monkeypatch.setattr(native_build, "_processor", lambda: ["another one"])
    native_build.load()
    assert len(kept(cache)) == 3


@pytest.mark.slow
def test_what_others_could_have_written_is_not_loaded(cache):
    native_build.load()
    (name,) = kept(cache)
    (cache / name).chmod(0o777)
    library = native_build.load()
    assert not isinstance(library, native_build.UnavailableError)
    assert (cache / name).stat().st_mode & 0o777 == 0o700
    cache.chmod(0o777)
    before = (cache / name).stat().st_mtime_ns
    assert not isinstance(native_build.load(), native_build.UnavailableError)
    assert (cache / name).stat().st_mtime_ns == before  # neither read nor replaced


@pytest.mark.slow
def test_without_a_folder_of_its_own_it_is_compiled_for_this_process(cache, tmp_path, monkeypatch):
    cache.parent.write_text("a file where the folder would be")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(native_build.tempfile, "tempdir", None)
    assert not isinstance(native_build.load(), native_build.UnavailableError)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


LOAD = "from aaconv.backends import native_build as b; print(type(b.load()).__name__)"


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def another_library(path):
    (needed,) = {line.split()[-1] for line in MAPS.read_text().splitlines() if "/libm.so" in line}
    shutil.copyfile(needed, path)


def replaced_by(make):
    def replace(path):
        path.unlink()
        make(path)

    return replace


MAPS = Path("/proc/self/maps")
DAMAGE = {
    "cut short": lambda path: os.truncate(path, 4096),
    "cut short at its end": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "a terabyte of zeros": lambda path: os.truncate(path, 2**40),
    "a bit flipped": flip_a_bit,
    "no library": lambda path: path.write_text("not ours"),
    "another library": another_library,
    "a pipe": replaced_by(os.mkfifo),
    "a link": replaced_by(lambda path: path.symlink_to("/dev/zero")),
    "a folder": replaced_by(Path.mkdir),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_kernel_is_built_again(damage, cache, built):
    """Runs in a separate process, because loading a damaged kernel would crash it."""
    cache.mkdir(0o700, parents=True)
    path = cache / built.name
    shutil.copy(built, path)
    DAMAGE[damage](path)
    done = run_app(["-c", LOAD], cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "CDLL\n"), done.stderr
    if damage != "a folder":
        assert path.read_bytes() == built.read_bytes()
        assert path.lstat().st_mode & 0o777 == 0o700
    assert kept(cache) == [built.name]
    assert not programs(cache)


@pytest.mark.slow
def test_what_is_kept_is_written_to_the_disk_before_it_has_its_name(cache, monkeypatch):
    synced = []

    def fsync(descriptor):
        assert not kept(cache)
        synced.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    native_build.load()
    (name,) = kept(cache)
    assert synced == [(cache / name).stat().st_ino]


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


WAITING = "waiting while another process compiles the attention kernel"


def test_waiting_for_another_process_is_one_line_and_has_an_end(cache, monkeypatch, caplog):
    """The other process may be suspended while it compiles, for example."""
    monkeypatch.setattr(native_build, "WAIT_SECONDS", 1)
    cache.mkdir(0o700, parents=True)
    with (cache / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found = native_build.load()
    assert str(found) == "is still being compiled by another process after 1 s"
    assert warnings(caplog) == [
        WAITING,
        f"attention on the CPU runs without the compiled kernel: it {found}",
    ]
    assert not programs(cache)


@pytest.mark.slow
def test_waiting_ends_with_the_kernel_of_the_other_process(cache, built, caplog):
    cache.mkdir(0o700, parents=True)
    with (cache / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        finish = threading.Timer(0.5, lambda: shutil.copy(built, cache / built.name))
        finish.start()
        found = native_build.load()
        finish.join()
    assert not isinstance(found, native_build.UnavailableError)
    assert warnings(caplog) == [WAITING]


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, 524])
def test_without_locks_each_process_compiles_for_itself(number, cache, built, monkeypatch, caplog):
    def flock(*_):
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert not isinstance(native_build.load(), native_build.UnavailableError)
    assert kept(cache) == [built.name]
    assert not warnings(caplog)


@pytest.mark.slow
@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/none/x")])
def test_a_lock_that_is_no_file_stops_nothing(make, cache, caplog):
    cache.mkdir(0o700, parents=True)
    make(cache / "lock")
    assert not isinstance(native_build.load(), native_build.UnavailableError)
    assert not warnings(caplog)


LAST = "for last; do :; done; "


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("exit 0", "native.so is not a file"),  # like CXX=true
        (LAST + "mkfifo $last; exit 0", "native.so is not a file"),
        (LAST + "echo rubbish > $last", "native.so"),
        (LAST + "{real} -shared -x c /dev/null -o $last", "has no function aaconv_attend"),
        (
            LAST + '{real} "$@"; case $last in *.so) truncate -s 4096 $last;; esac',
            "native.so is truncated",
        ),
        ("cat", "native.so is not a file"),  # must not wait for keyboard input
        (None, "needs a C++ compiler, but none of g++, c++, clang++ is in PATH"),
        ("echo 'x.cpp:1: error: no such flag' >&2; exit 1", "x.cpp:1: error: no such flag"),
        ("kill -9 $$", "was not compiled: signal 9 ended "),
        ("sleep 60", "was not compiled within 0.1 s"),
        ("exit 3", "exit code 3"),
    ],
)
def test_without_a_compiler_there_is_another_backend_and_one_line(
    script, words, cache, monkeypatch, tmp_path, caplog, compile_once
):
    if script is None:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
    else:
        script = script.replace("{real}", compile_once)
        monkeypatch.setenv("CXX", fake_compiler(tmp_path, script))
    monkeypatch.setattr(native_build, "BUILD_SECONDS", 0.1 if "within" in words else 60)
    found = native_build.load()
    assert words in str(found)
    (line,) = warnings(caplog)
    assert words in line
    assert "\n" not in line
    monkeypatch.setattr(native_build, "load", lambda: found)
    q = torch.randn(2, 3, 9, 8, 4)
    table = [torch.randn(17, 4), torch.randn(15, 4)]
    assert functional.choose_backend(q, relative=True) == "tiled"
    assert attention_2d(q, q, q, *table).shape == q.shape
    with pytest.raises(ValueError, match=re.escape(f"backend='native' {found}; use")):
        attention_2d(q, q, q, backend="native")
    with pytest.raises(RuntimeError, match=re.escape(f"backend='native' {found}")):
        # The call of a program that was exported on another machine.
        torch.ops.aaconv.native_attend(q, q, q, None, None)
    if cache.exists():
        assert not kept(cache)
        assert not programs(cache)


@pytest.mark.parametrize(
    "chosen", ["no-such-compiler -v", "'g++", 'g++ "', "\\", " ", "/", "/etc/passwd", "''", "#"]
)
def test_a_chosen_compiler_that_is_none(chosen, cache, monkeypatch):
    monkeypatch.setenv("CXX", chosen)
    words = " ".join(f"needs a C++ compiler, but CXX={chosen} is not a program in PATH".split())
    assert str(native_build.load()) == words


@pytest.mark.parametrize("interpreter", ["#!/no/such/interpreter", "\x7fELF, and no more", ""])
def test_a_compiler_that_cannot_be_started(interpreter, cache, monkeypatch, tmp_path):
    compiler = tmp_path / os.fsdecode(b"compiler-\xff")
    compiler.write_text(interpreter)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert str(native_build.load()).startswith("was not compiled: ")


def test_of_a_compiler_that_hangs_no_process_is_left(cache, monkeypatch, tmp_path):
    monkeypatch.setattr(native_build, "BUILD_SECONDS", 1)
    script = f"sleep 600 & echo $! > {tmp_path}/pid; wait"
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, script))
    assert str(native_build.load()) == "was not compiled within 1 s"
    process = Path("/proc", (tmp_path / "pid").read_text().strip(), "cmdline")
    assert not process.exists() or b"sleep" not in process.read_bytes()


@pytest.mark.slow
def test_ten_processes_at_once_compile_it_once(cache, tmp_path):
    """The compiler logs its calls: it is called once to compile and once to link."""
    real = native_build._compiler()[0]
    script = f'echo called >> {tmp_path}/calls\nexec {real} "$@"'
    compiler = fake_compiler(tmp_path, script)
    environment = os.environ | {"CXX": compiler, "OMP_NUM_THREADS": "1"}
    processes = [
        App(["-c", LOAD], cwd=ROOT, env=environment, stdout=subprocess.PIPE) for _ in range(10)
    ]
    assert {p.communicate(timeout=240)[0] for p in processes} == {b"CDLL\n"}
    assert (tmp_path / "calls").read_text().count("called") == 2
    assert len(kept(cache)) == 1


@pytest.mark.thorough
def test_a_compiler_without_openmp_makes_a_kernel_of_one_thread(cache, tmp_path, monkeypatch):
    real = native_build._compiler()[0]
    refuse = 'case "$*" in *-fopenmp*) echo "error: unsupported option" >&2; exit 1;; esac'
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, f'{refuse}\nexec {real} "$@"'))
    library = native_build.load()
    monkeypatch.setattr(native_build, "load", lambda: library)
    check(single(inputs((5, 3), 2, 7, 3)))


@pytest.mark.thorough
def test_shorter_vectors_compute_the_same(cache, monkeypatch):
    """Build without -march=native, as for processors without AVX-512."""
    flags = [flag for flag in native_build.FLAGS if flag != "-march=native"]
    monkeypatch.setattr(native_build, "FLAGS", tuple(flags))
    library = native_build.load()
    monkeypatch.setattr(native_build, "load", lambda: library)
    check(single(inputs((5, 13), 2, 7, 3)))


SANITIZED = """
#include "{source}"
#include <cstdio>
int main() {{
  const long shapes[][5] = {{{{1, 1, 1, 1, 1}}, {{2, 1, 37, 3, 2}}, {{1, 17, 5, 20, 2}},
                             {{3, 4, 4, 8, 17}}, {{1, 19, 11, 7, 3}}}};
  for (auto [N, H, W, D, E] : shapes)
    for (bool relative : {{false, true}}) {{
      const long L = H * W, B = 2;
      std::vector<float> q(B * N * L * D, .5f), k = q, v(B * N * L * E, .25f), grad = v, out = v;
      std::vector<float> lse(B * N * L), dq = q, dk = q, dv = v;
      std::vector<float> rel_h((2 * H - 1) * D, .1f), rel_w((2 * W - 1) * D, .1f);
      std::vector<float> drel_h(B * N * D * (2 * H - 1)), drel_w(B * N * D * (2 * W - 1));
      std::vector<long> numbers = {{B, N, H, W, D, E, 2}};
      for (long C : {{D, D, E, E}})
        for (long n : {{0l, N * L * C, L * C, W, 1l, L}}) numbers.push_back(n);
      float* none = nullptr;
      void* data[] = {{q.data(), k.data(), v.data(), nullptr, relative ? rel_h.data() : none,
                      relative ? rel_w.data() : none, out.data(), lse.data(), dq.data(),
                      dk.data(), dv.data(), drel_h.data(), drel_w.data()}};
      aaconv_attend(data, numbers.data());
      data[3] = grad.data();
      aaconv_attend_backward(data, numbers.data());
      for (float x : out)
        if (std::abs(x - .25f) > 1e-5f) return 1;
    }}
  std::puts("clean");
}}
"""


@pytest.mark.thorough
def test_sanitizers_find_nothing(tmp_path):
    """Check for out-of-bounds access and undefined behavior, for both vector lengths."""
    main = tmp_path / "main.cpp"
    main.write_text(SANITIZED.format(source=native_build.SOURCE))
    compiler = native_build._compiler()
    for extra in (["-march=native"], []):
        flags = ["-std=c++17", "-O1", "-g", native_build.OPENMP, *extra]
        flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        command = [*compiler, *flags, str(main), "-o"]
        program = tmp_path / "program"
        subprocess.run([*command, str(program)], check=True, capture_output=True)
        environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
        said = subprocess.run([program], env=environment, capture_output=True, text=True)
        assert (said.returncode, said.stdout) == (0, "clean\n"), said.stderr[:2000]
