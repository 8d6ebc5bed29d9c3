"""The README's numbers: the committed text is up to date; the text generated from made-up runs."""

import re

import pytest

from benchmarks.measure import run_file
from benchmarks.measure.statistics import ratios
from benchmarks.report import readme
from benchmarks.suites import providers
from support import ROOT
from support.rows import ENVIRONMENT, made_row


def case(group, upstream, ours, provider="t2t_fast", **fields):
    """Upstream's row of a group and ours, with the same seconds in every round."""
    level, subject, size, batch, dtype, mode = re.fullmatch(r"(\w+)-(.+)-(\d+)px-b(\d+)-(\w+)-(\w+)", group).groups()
    if level == "latency":
        fields["suite"], level = "latency", "model"
    fields |= dict(level=level, subject=subject, size=int(size), batch=int(batch), dtype=dtype, mode=mode, group=group)
    before, after = [upstream] * 7, [ours] * 7
    return [
        made_row("upstream", before, **{**fields, "speedup": ratios(before, before)}),
        made_row(provider, after, **{**fields, "speedup": ratios(before, after)}),
    ]


def written(root, folders, text="before\n<!-- numbers: {} -->\nold\n<!-- /numbers -->\nafter\n"):
    """A README and its folders of results; ``folders``: name -> run."""
    for name, run in folders.items():
        (root / name).mkdir()
        run_file.write(root / name / "rows.json", run)
    path = root / "README.md"
    path.write_text(text.format(", ".join(folders)))
    return path


def made(rows, environment=ENVIRONMENT, left_out=()):
    return run_file.RunFile(environment, rows, list(left_out))


def section(path):
    """The generated text as a list of blocks, each paragraph joined into one line."""
    assert readme.main(["--readme", str(path)]) == 0
    return [" ".join(block.splitlines()) if "|" not in block else block for block in path.read_text().split("\n\n")]


def test_the_committed_readme_is_generated(capsys):
    """If this fails, run python -m benchmarks.report.readme."""
    if not (ROOT / "benchmarks" / "results").exists():
        pytest.skip("an archive of the sources has no results")
    assert readme.main(["--check"]) == 0, capsys.readouterr().out


def test_only_marked_text_changes(tmp_path):
    path = written(tmp_path, {"a": made(case("module-performer-224px-b8-fp32-inference", 0.1, 0.05))})
    assert readme.main(["--readme", str(path), "--check"]) == 1
    assert "old" in path.read_text()
    assert readme.main(["--readme", str(path)]) == 0
    text = path.read_text()
    assert text.startswith("before\n<!-- numbers: a -->\n") and text.endswith("\n<!-- /numbers -->\nafter\n")
    assert "old" not in text and "2.00×" in text
    assert readme.main(["--readme", str(path), "--check"]) == 0


def test_check_shows_a_number_that_was_edited(tmp_path, capsys):
    path = written(tmp_path, {"a": made(case("module-performer-224px-b8-fp32-inference", 0.1, 0.05))})
    readme.main(["--readme", str(path)])
    path.write_text(path.read_text().replace("2.00×", "9.00×"))
    assert readme.main(["--readme", str(path), "--check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("-") and "9.00×" in line for line in lines)
    assert any(line.startswith("+") and "2.00×" in line for line in lines)


def test_models_lite_ones_first(tmp_path):
    left = dict(unfused="norm, head")
    rows = [
        *case("model-t2t_vit_14-224px-b8-fp32-inference", 0.4, 0.35, **left),
        *case("model-t2t_vit_7-224px-b8-fp32-inference", 0.12, 0.1, **left),
        *case("model-t2t_vit_7-224px-b8-fp32-training", 2.0, 1.6, **left),
        *case("model-t2t_vit_7-224px-b8-bf16-inference", 0.1, 0.01, **left),
    ]
    first, second = [block for block in section(written(tmp_path, {"a": made(rows)})) if "whole model" in block]
    assert second.splitlines() == [
        "| whole model, bfloat16 | inference | speed-up | training step | speed-up | not fused |",
        "|---|---|---|---|---|---|",
        "| `t2t_vit_7`, 224 px, batch 8 | 100 ms → 10.0 ms | 10.00× (10.00 – 10.00) | – | – | norm, head |",
    ]
    assert first.splitlines() == [
        "| whole model, float32 | inference | speed-up | training step | speed-up | not fused |",
        "|---|---|---|---|---|---|",
        "| `t2t_vit_7`, 224 px, batch 8 | 120 ms → 100 ms | 1.20× (1.20 – 1.20) | 2.00 s → 1.60 s "
        "| 1.25× (1.25 – 1.25) | norm, head |",
        "| `t2t_vit_14`, 224 px, batch 8 | 400 ms → 350 ms | 1.14× (1.14 – 1.14) | – | – | norm, head |",
    ]


def test_other_runtimes_are_shown_where_they_were_measured_and_where_they_win(tmp_path):
    model, single = "model-t2t_vit_7-224px-b8-{}-inference", "latency-t2t_vit_7-224px-b1-{}-inference"
    rows = [
        *case(model.format("fp32"), 0.4, 0.2),
        *case(model.format("fp32"), 0.4, 0.1, "openvino")[1:],
        *case(model.format("fp32"), 0.4, 0.5, "onnxruntime")[1:],
        *case(model.format("bf16"), 0.4, 0.25, "upstream-compiled")[1:],
        *case(model.format("bf16").replace("inference", "training"), 0.9, 0.7, "upstream-compiled"),
        *case("model-t2t_vit_14-224px-b8-fp32-inference", 0.8, 0.4),
        *case(model.format("bf16"), 0.4, 0.1),
        *case(model.format("bf16"), 0.4, 0.2, "openvino")[1:],
        *case(single.format("bf16"), 0.4, 0.1, p95_s=0.2),
        *case(single.format("bf16"), 0.4, 0.2, "openvino", p95_s=0.3)[1:],
        *case(single.format("bf16"), 0.4, 0.2, "t2t_fast-fp32", p95_s=0.3)[1:],
    ]
    path = written(tmp_path, {"a": made(rows)})
    blocks = section(path)
    lines = [line for block in blocks for line in block.splitlines()]
    heads = "| whole model, {} | inference | speed-up | {} | training step | speed-up | not fused |"
    assert heads.format("float32", "OpenVINO | ONNX Runtime") in lines
    change = "| `t2t_vit_7`, 224 px, batch 8 | 400 ms → 200 ms | 2.00× (2.00 – 2.00) |"
    assert f"{change} 100 ms, 4.00× | 500 ms, 0.80× | – | – | – |" in lines
    assert any(line.startswith("| `t2t_vit_14`") and line.endswith("| – | – | – | – | – |") for line in lines)
    assert heads.format("bfloat16", "`torch.compile` | OpenVINO") in lines
    assert any(line.endswith("| 250 ms, 1.60× | 200 ms, 2.00× | – | – | – |") for line in lines)
    heads = "| one image, bfloat16: median, 95th percentile | upstream | t2t_fast | upstream, OpenVINO | {} |"
    assert heads.format("t2t_fast, float32") in lines
    assert any(line.count("200 ms, 300 ms; 2.00×") == 2 for line in lines)
    text = "With upstream's exported graph, OpenVINO is faster than t2t_fast in 1 of 3 cases, "
    assert f"{text}ONNX Runtime is faster than t2t_fast in 0 of 1 cases." in blocks


def test_module_batches_latency_operators_fits(tmp_path):
    share = dict(floor_share=0.4)
    rows = [
        *case("module-performer-224px-b8-fp32-inference", 0.1, 0.05, **share),
        *case("module-performer-224px-b8-fp32-training", 0.4, 0.1, saved=16e6, **share),
        *case("module-transformer-224px-b32-fp32-training", 0.4, 0.2),
        *case("latency-t2t_vit_7-224px-b1-fp32-inference", 0.02, 0.01, p95_s=0.03),
        *case("op-soft_split-stage1-224px-b8-fp32-inference", 0.02, 0.01, floor_share=1 / 3),
        *case("op-soft_split-fuseformer-224px-b8-fp32-inference", 0.06, 0.02, floor_share=0.25),
    ]
    fit = {"suite": "memory", "level": "model", "subject": "t2t_vit_7", "dtype": "fp32", "limit_bytes": 2e9}
    rows += [
        {**fit, "group": f"memory-{size}", "size": size, "provider": name, "label": name, "batch": batch}
        for size, name, batch in [(224, "upstream", 37), (224, "t2t_fast", 73), (384, "t2t_fast", 20)]
    ]
    blocks = section(written(tmp_path, {"a": made(rows)}))
    lines = [line for block in blocks for line in block.splitlines()]
    assert "| inference | 100 ms | 50.0 ms, 2.00× (2.00 – 2.00) |" in lines
    assert "| kept for backward, per image | 2.00 MB | 2.00 MB |" in lines
    assert any(block.endswith("the floor is 40 % of the 50.0 ms and 40 % of the 100 ms.") for block in blocks)
    assert "| Performer module | 2.00× / 4.00× | – |" in lines and "| Transformer module | – | 2.00× |" in lines
    assert "| `t2t_vit_7`, 224 px | 20.0 ms, 30.0 ms | 10.0 ms, 30.0 ms; 2.00× |" in lines
    assert "| `soft_split` | 1 / FuseFormer | 2.00× / 3.00× | 33 / 25 % | – | – |" in lines
    assert "| `t2t_vit_7`, float32, 224 / 384 px, 2.00 GB | 37 / – | 73 / 20 |" in lines


def test_the_headline_has_the_first_size_alone(tmp_path):
    rows = [
        *case("model-t2t_vit_7-224px-b8-fp32-inference", 0.12, 0.1),
        *case("model-t2t_vit_7-384px-b8-fp32-inference", 0.4, 0.3),
        *case("module-performer-224px-b8-fp32-inference", 0.1, 0.05, floor_share=0.4),
        *case("op-token_mlp-stage1-224px-b8-fp32-training", 0.1, 0.2),
    ]
    text = "<!-- headline: {} -->\nold\n<!-- /headline -->\n"
    found = "\n".join(section(written(tmp_path, {"a": made(rows)}, text)))
    assert "| `t2t_vit_7`, 224 px, batch 8 |" in found and "| inference | 100 ms | 50.0 ms, 2.00×" in found
    assert "384 px" not in found and "token_mlp" not in found and "floor" not in found and "old" not in found


def test_losses_and_missed_goals_are_named(tmp_path):
    group = "module-performer-224px-b8-fp32-training"
    rows = case(group, 0.1, 0.125) + case("module-performer-224px-b32-fp32-training", 0.1, 0.05)
    rows += case("op-token_mlp-stage1-224px-b8-fp32-training", 0.1, 0.2, "aten")
    left_out = [{"group": group, "provider": "sdpa", "reason": "too large"}]
    text = " ".join(section(written(tmp_path, {"a": made(rows, left_out=left_out)})))
    assert f"Of t2t_fast's 2 rows 1 is slower than upstream eager: `{group}` t2t_fast, eager, 0.80×." in text
    assert "Backends that `auto` does not select here (aten) are slower than upstream in 1 of 1 rows." in text
    goal = "T2T module, performer, training: t2t_fast faster than upstream (0.80x (0.80 to 0.80), wanted 2x)"
    assert f"that this run measured are reached. Not reached: {goal}." in text
    assert "Planned rows without numbers: 1;" in text


def test_each_folder_has_a_part_of_its_own(tmp_path):
    gpu = {**ENVIRONMENT, "device": "a card", "gpu": "a card"}
    rows = case("module-performer-224px-b256-bf16-inference", 0.1, 0.02)
    folders = {"a": made(case("module-performer-224px-b8-fp32-inference", 0.1, 0.05)), "b": made(rows, gpu)}
    path = written(tmp_path, folders)
    for name in ("rows.csv", "report.html"):
        (tmp_path / "a" / name).touch()
    text = " ".join(section(path))
    assert text.index("Measured on a processor, 2 threads") < text.index("2.00×") < text.index("Measured on a card")
    assert text.index("Measured on a card") < text.index("5.00×")
    assert "no GPU" not in text
    links = re.findall(r"\[(\w+)\]\(([^)]+)\)", text[: text.index("a card")])
    assert links[-2:] == [("report", "a/report.html"), ("CSV", "a/rows.csv")]


def test_missing_gpu_is_stated(tmp_path):
    run = made(case("module-performer-224px-b8-fp32-inference", 0.1, 0.05))
    assert "There are no GPU measurements yet." in " ".join(section(written(tmp_path, {"a": run})))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no markers\n", "got 0 pairs"),
        ("<!-- numbers: a -->\n", "got 0 pairs"),
        (2 * "<!-- numbers: a -->\n<!-- /numbers -->\n", "got 2 pairs"),
        (
            "<!-- numbers: a, nowhere -->\n<!-- /numbers -->\n",
            "No such file or directory",
        ),
    ],
)
@pytest.mark.parametrize("options", [[], ["--check"]], ids=["write", "check"])
def test_bad_usage_is_one_line_and_code_2(tmp_path, capsys, text, words, options):
    run = made(case("module-performer-224px-b8-fp32-inference", 0.1, 0.05))
    path = written(tmp_path, {"a": run}, text)
    assert readme.main(["--readme", str(path), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m benchmarks.report.readme: ") and words in line
    assert path.read_text() == text


def test_the_columns_are_providers():
    assert set(readme.SHOWN) <= set(providers.BY_NAME)
