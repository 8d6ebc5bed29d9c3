"""The native CPU operators under AddressSanitizer and UndefinedBehaviorSanitizer.

``make sanitize`` compiles ``csrc/`` with both into a separate folder below ``build/`` and calls every operator, in
every instruction set of this CPU, with random arguments: valid ones in all memory layouts, and hostile ones (sizes,
strides and paddings up to the limits of int64, NaN, tensors of the wrong rank, shape or dtype). A valid call must
return, a hostile one may raise ``RuntimeError``. The run fails at a sanitizer's report, another exception or a crash,
and prints the number of the case for ``--only``.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FLAGS = "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -fno-omit-frame-pointer -O0 -g1"
FLAGS += " -DT2T_FAST_EMULATE_TILES -Wno-psabi"  # the kernels for AMX, on any CPU
HOSTILE = (-(2**63), -(2**31), -1, 0, 1, 2, 2**30, 2**31 - 1, 2**31, 2**32, 2**61, 2**62, 2**63 - 1)
NUMBERS = (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e-40, 0.5, 1.0, 2.0, 1e308)
WORK = 2**20  # the most multiplications in one call
MOST_MEGABYTES = 256  # per allocation; a larger one fails, as when memory is exhausted


def runtime(name):
    """The path of one of g++'s runtime libraries, or ``None``."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return found if os.path.isabs(found) else None


def build(root, flags=FLAGS):
    """The library of operators of ``root``/csrc, compiled by g++ with ``flags``, below ``root``/build."""
    sys.path.insert(0, str(ROOT))
    from build_support import operators

    before = {name: os.environ.get(name) for name in ("CXX", "CXXFLAGS", "LDFLAGS")}
    os.environ |= {"CXX": "g++", "CXXFLAGS": flags, "LDFLAGS": flags}
    try:
        return operators.build(root, with_cuda=False).library
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def check(cases, seed=0, only=None, root=ROOT):
    """Build, make ``cases`` calls in a child process that prints its progress, and return its exit status."""
    library = build(root)
    runtimes = [runtime(name) for name in RUNTIMES]
    settings = f"detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb={MOST_MEGABYTES}"
    environment = os.environ | {
        "LD_PRELOAD": ":".join(runtimes),
        "ASAN_OPTIONS": settings,
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "3",
    }
    # PyTorch writes a stack trace to stderr for every refused call; a sanitizer's report comes last
    with tempfile.NamedTemporaryFile("r") as current, tempfile.NamedTemporaryFile("r", errors="replace") as errors:
        command = [sys.executable, __file__, "--library", library, "--current", current.name, "--seed", str(seed)]
        command += ["--cases", str(cases)] if only is None else ["--only", str(only)]
        with open(errors.name, "w") as stderr:
            status = subprocess.run(command, env=environment, stderr=stderr).returncode
        if status != 0:
            words = ("runtime error", "Sanitizer", "csrc/", "Error")
            print(*[line for line in errors if any(word in line for word in words)][-30:], sep="")
            print(f"FAILED with status {status} in case {current.read().strip()}; --seed {seed} --only CASE repeats it")
    return status


RUNTIMES = ("libasan.so", "libubsan.so", "libstdc++.so")  # the last must be loaded when asan resolves __cxa_throw


class Draw:
    """Draws random arguments of the operators from one seed."""

    def __init__(self, seed):
        import torch

        self.torch, self.random = torch, random.Random(seed)
        torch.manual_seed(seed)

    def size(self, most):
        """A small size, often 1, sometimes close to a register's width."""
        choose = self.random.choice
        return choose([1, 1, 2, 3, self.random.randint(1, most), min(most, choose([8, 16, 17]))])

    def tensor(self, *shape, dtype=None):
        """A tensor in a random layout, without memory after its last element."""
        torch = self.torch
        dtype = dtype or torch.float32
        layout = self.random.choice(["contiguous", "permuted", "slice", "expanded", "odd strides"])
        if layout == "permuted":
            order = self.random.sample(range(len(shape)), len(shape))
            values = torch.randn([shape[i] for i in order], dtype=torch.float64).to(dtype)
            return values.permute([order.index(i) for i in range(len(shape))])
        values = torch.randn(shape, dtype=torch.float64).to(dtype)
        if layout == "slice":
            wide = torch.empty([n + self.random.randint(0, 2) for n in shape], dtype=dtype)
            view = wide[tuple(slice(m - n, None) for n, m in zip(shape, wide.shape, strict=True))]
            return view.copy_(values)
        if layout == "expanded":
            dim = self.random.randrange(len(shape))
            return values.narrow(dim, 0, min(1, shape[dim])).expand(shape)
        if layout == "odd strides":
            odd = [self.random.choice([0, 1, 2**40, 2**62]) for _ in shape]
            strides = [s if n > 1 else o for n, s, o in zip(shape, values.stride(), odd, strict=True)]
            return values.as_strided(shape, strides)
        return values

    def optional(self, *shape):
        return self.tensor(*shape) if self.random.random() < 0.7 else None

    def window(self):
        """An image size and the kernel, stride and padding of a window that fits."""
        size, kernel, stride, padding = [], [], [], []
        for _ in range(2):
            n, p = self.size(20), self.random.choice([0, 0, 1, 2, 5])
            k = min(n + 2 * p, self.random.choice([1, 2, 3, 4, 5, 7, 11]))
            size.append(n)
            kernel.append(k)
            stride.append(self.random.choice([1, 1, 2, 3, 4, 9, 300]))
            padding.append(p)
        if self.random.random() < 0.1:  # valid and huge: one to three windows far apart
            stride, padding = [2**30, 2**30], [self.random.choice([0, 2**30 - 20])] * 2
            kernel = [1 + self.random.randint(0, 2), 1]
            size = [max(size[0], 3), size[1]]
        return size, kernel, stride, padding

    def grid(self, size, kernel, stride, padding):
        return [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel, stride, padding, strict=True)]

    def floating(self):
        torch = self.torch
        return self.random.choice([torch.float32, torch.float64, torch.float16, torch.bfloat16])

    def probability(self):
        return self.random.choice([0.0, 0.0, 0.1, 0.5, 0.99999])

    # ---- the arguments of each operator; a backward operator also takes the outputs of its forward

    def soft_split(self):
        size, *window = self.window()
        return [self.tensor(self.random.randint(0, 3), self.size(20), *size, dtype=self.floating()), *window]

    def _tokens(self):
        size, *window = self.window()
        h, w = self.grid(size, *window)
        (kh, kw), _, _ = window
        return (
            self.tensor(self.random.randint(0, 3), h * w, self.size(20) * kh * kw, dtype=self.floating()),
            size,
            window,
        )

    def soft_composition(self):
        tokens, size, window = self._tokens()
        return [tokens, size, *window, self.random.random() < 0.5]

    def fused_fold_unfold(self):
        tokens, size, window = self._tokens()
        return [tokens, size, *window]

    def _linear(self, outputs):
        size, *window = self.window()
        batch, channels = self.random.randint(0, 4), self.size(9)
        h, w = self.grid(size, *window)
        columns = channels * window[0][0] * window[0][1]
        x = self.tensor(batch, channels, *size)
        affine = self.random.random() < 0.5
        parameters = [self.tensor(outputs, columns), self.optional(outputs)]
        norm = [self.optional(columns) if affine else None, self.optional(columns) if affine else None]
        eps = self.random.choice([None, 1e-5]) if norm == [None, None] else 1e-5
        return [x, *parameters, *norm, eps, *window], (batch, h * w)

    def soft_split_linear(self):
        return self._linear(self.size(40))[0]

    def soft_split_linear_backward(self):
        outputs = self.size(40)
        arguments, tokens = self._linear(outputs)
        return [self.tensor(*tokens, outputs), *arguments, self.random.random() < 0.5, self.random.random() < 0.5]

    def performer_attention(self):
        batch, queries, keys, width = self.random.randint(0, 4), self.size(200), self.size(200), self.size(40)
        q, k, v = (self.tensor(batch, n, width) for n in (queries, keys, keys))
        return [q, k, v, self.tensor(self.size(20), width), self.random.choice([0.0, 1e-8, 0.1])]

    def performer_attention_backward(self):
        q, k, v, w, eps = self.performer_attention()
        (features, width), batch = w.shape, q.shape[0]
        state = self.tensor(batch, features), self.tensor(batch, features, width)
        return [self.tensor(*q.shape), q, k, v, w, eps, *state, self.random.random() < 0.5]

    def _mlp(self, width):
        hidden = self.size(40)
        drops = self.probability(), self.probability()
        seed = self.torch.tensor(self.random.randint(-(2**63), 2**63 - 1)) if any(drops) else None
        return [
            self.tensor(width, width), self.optional(width), self.optional(width), self.optional(width), 1e-5,
            self.tensor(hidden, width), self.optional(hidden), self.tensor(width, hidden), self.optional(width),
            *drops, seed,
        ]  # fmt: skip

    def token_mlp(self):
        shape = self.random.randint(0, 4), self.size(200), self.size(40)
        return [self.tensor(*shape), self.tensor(*shape), *self._mlp(shape[-1])]

    def token_mlp_backward(self):
        y, *rest = self.token_mlp()
        return [self.tensor(*y.shape), y, *rest]

    def performer_layer(self):
        return self._layer()[0]

    def _layer(self):
        width, features = self.size(20), self.size(12)
        linear, tokens = self._linear(3 * width)
        eps = self.random.choice([0.0, 1e-8, 0.1])
        return [*linear, self.tensor(features, width), eps, *self._mlp(width)], (*tokens, width), features

    def performer_layer_backward(self):
        arguments, (batch, length, width), features = self._layer()
        state = self.tensor(batch, features), self.tensor(batch, features, width)
        needs = [self.random.random() < 0.5 for _ in range(3)]
        return [self.tensor(batch, length, width), *arguments, *state, *needs]

    def pack_linear(self):
        outputs, inputs = self.size(60), self.size(40)
        norm = [self.optional(inputs), self.optional(inputs)]
        flags = [self.random.random() < 0.5 for _ in range(2)]
        return [self.tensor(outputs, inputs), self.optional(outputs), *norm, *flags]

    def _block(self, back):
        heads, batch, length = self.random.randint(1, 3), self.random.randint(0, 4), self.size(300)
        width, hidden = heads * self.size(20), self.random.choice([self.size(40), 513])
        bf16 = self.random.random() < 0.5
        packed_size = self.torch.ops.t2t_fast_native.packed_linear_size
        shapes = (width, 3 * width), (width, width), (width, hidden), (hidden, width)
        packed = [self.tensor(packed_size(*shape, bf16, back)) for shape in shapes]
        numbers = [heads, hidden, self.random.choice([0.1, 1.0, 30.0]), 1e-5, 1e-6]
        arguments = [self.tensor(batch, length, width), *packed, *numbers, self.optional(2, batch), bf16]
        return arguments, (batch, length, width, heads, hidden)

    def transformer_block(self):
        return [*self._block(False)[0], self.random.random() < 0.5]

    def transformer_block_backward(self):
        arguments, (batch, length, width, heads, hidden) = self._block(True)
        dtype = self.torch.bfloat16 if arguments[-1] else self.torch.float32
        qkv, y, t, h = (self.torch.randn(batch, length, columns) for columns in (3 * width, width, width, hidden))
        saved = [qkv.to(dtype), y.to(dtype), self.tensor(batch, heads, length), t, h.to(dtype)]
        needed = [self.random.choice([0, 1]) for _ in range(4)]
        return [self.tensor(batch, length, width), *arguments, *saved, needed]

    # ---- hostile arguments

    def spoil(self, arguments):
        """Replace one to three arguments by others of the same type, most of them invalid."""
        for index in self.random.sample(range(len(arguments)), self.random.randint(1, min(3, len(arguments)))):
            arguments[index] = self._spoilt(arguments[index])
        return arguments

    def _spoilt(self, value):
        torch, choose = self.torch, self.random.choice
        if isinstance(value, list):
            if self.random.random() < 0.2:
                return choose([[], value[:1], [*value, 1]])
            return [choose(HOSTILE) if self.random.random() < 0.6 else n for n in value]
        if isinstance(value, bool):
            return not value
        if isinstance(value, int):
            return choose(HOSTILE)
        if isinstance(value, float):
            return choose(NUMBERS)
        if value is None:
            return self.tensor(choose([0, 1, 3, 8]))
        shape = list(value.shape)
        for _ in range(self.random.randint(0, 2)):
            change = choose(["rank", "size", "empty", "expand", "dtype"])
            if change == "rank":
                shape = choose([shape[:-1], [*shape, 1], [1, *shape], []])
            elif change == "size" and shape:
                shape[self.random.randrange(len(shape))] += choose([-1, 1, 2]) if min(shape) > 0 else 1
            elif change == "empty" and shape:
                shape[self.random.randrange(len(shape))] = 0
            elif change == "expand":
                dims = [self.random.randrange(len(shape))] if shape else []
                huge = [choose([2**20, 2**40, 2**61]) if i in dims else 1 for i in range(len(shape))]
                return torch.zeros([1] * len(shape), dtype=value.dtype).expand(huge)
            elif change == "dtype":
                return torch.zeros(shape, dtype=choose([torch.float64, torch.int64, torch.bool, torch.complex64]))
        return self.tensor(*shape, dtype=value.dtype) if shape else torch.zeros((), dtype=value.dtype)


OPERATORS = (
    "soft_split", "soft_composition", "fused_fold_unfold", "soft_split_linear", "soft_split_linear_backward",
    "performer_attention", "performer_attention_backward", "token_mlp", "token_mlp_backward", "performer_layer",
    "performer_layer_backward", "pack_linear", "transformer_block", "transformer_block_backward",
)  # fmt: skip
LAYERS = OPERATORS[3:11]


def effort(arguments):
    """An upper bound of the work of a call with these arguments, if it is accepted."""
    tensors = [value for value in arguments if hasattr(value, "numel")]
    windows = [value for value in arguments if isinstance(value, list)][-3:]
    total = max(value.numel() for value in tensors)
    if len(windows) == 3 and all(len(pair) == 2 and min(pair) >= 0 for pair in windows):
        image = next((value for value in tensors if value.ndim == 4), None)
        size = image.shape[2:] if image is not None else next(v for v in arguments if isinstance(v, list))
        if len(size) == 2 and min(size) >= 0 and all(all(pair) for pair in windows[:2]):
            tokens = taps = 1
            for n, k, s, p in zip(size, *windows, strict=True):
                tokens, taps = tokens * max(0, (n + 2 * p - k) // s + 1), taps * k
            batch, channels = image.shape[:2] if image is not None else (1, 1)
            total = max(total, batch * tokens * channels * taps)
    return total


def exercise(library, cases, current, seed, only):
    """Make the calls, in the sanitized process."""
    import torch

    torch.ops.load_library(library)
    native = torch.ops.t2t_fast_native
    sets = ["amx", "avx512_bf16", "avx512", "avx2", "baseline"]
    available = {False: [], True: []}  # for products of float32 and of bfloat16
    for bf16, found in available.items():
        for name in sets:
            try:
                found.append(native.cpu_instruction_set(name, bf16))
            except RuntimeError:
                continue
    begin = said = time.monotonic()
    returned = refused = skipped = 0
    numbers = range(cases) if only is None else [only]
    with open(current, "r+b", buffering=0) as file:
        for number in numbers:
            name = OPERATORS[number % len(OPERATORS)]
            hostile = number // len(OPERATORS) % 2 == 1
            for bf16, found in available.items():  # a packed weight's size depends on it
                native.cpu_instruction_set(found[number // (2 * len(OPERATORS)) % len(found)], bf16)
            draw = Draw(seed * 2**32 + number)
            arguments = getattr(draw, name)()
            if name in LAYERS:
                arguments.append(draw.random.random() < 0.5)  # bf16
            if hostile:
                arguments = draw.spoil(arguments)
            file.seek(0)
            file.write(f"{number} ({name})".encode().ljust(64))
            if only is not None:
                print(name, [tuple(v.shape) if hasattr(v, "shape") else v for v in arguments], flush=True)
            if effort(arguments) in range(WORK, MOST_MEGABYTES * 2**18):
                skipped += 1
                continue
            try:
                getattr(native, name)(*arguments)
                returned += 1
            except RuntimeError:
                if not hostile:
                    raise
                refused += 1
            if time.monotonic() - said > 5:
                said = time.monotonic()
                print(f"{number + 1} of {cases} cases, {said - begin:.0f} s", flush=True)
    seconds = time.monotonic() - begin
    print(
        f"{returned} calls returned, {refused} were refused, {skipped} were left out as too long; {seconds:.0f} s, "
        f"seed {seed}, {', '.join(available[True])}: no report"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one case")
    parser.add_argument("--library", help=argparse.SUPPRESS)
    parser.add_argument("--current", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.library is None:
        sys.exit(check(given.cases, given.seed, given.only))
    exercise(given.library, given.cases, given.current, given.seed, given.only)


if __name__ == "__main__":
    main()
