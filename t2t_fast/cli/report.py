"""The demo's report: pictures as files, one HTML page that holds them all, the numbers as JSON, a summary in text."""

import json
from html import escape

from . import charts, page, pictures

RANDOM = (
    "The weights are random (seed {seed}): the class scores carry no meaning. That both forms give the same ones does."
)


def megabytes(value):
    """Bytes in words."""
    return f"{value / 1e6:.1f} MB" if value < 1e9 else f"{value / 1e9:.2f} GB"


def milliseconds(value):
    """Milliseconds in words, three digits."""
    return f"{value:.3g} ms" if value < 1000 else f"{value:.0f} ms"


def draw(out, photo, x, stages, logits, data, halves):
    """Write the PNG files.

    Returns:
        name -> path.
    """
    first = pictures.zoom_tokens(x)
    batch = data["model"]["batch"]
    times = [
        (row["what"], *((row[f]["median"], row[f]["low"], row[f]["high"]) for f in ("before", "after")))
        for row in data["time"]
    ]
    memory = [(row["what"], *((row[f], None, None) for f in ("before", "after"))) for row in data["memory"]]
    figures = {
        "photo": lambda: pictures.photo_figure(photo, x),
        "windows": lambda: pictures.windows_figure(x, first),
        "tokens": lambda: pictures.tokens_figure(x, first),
        "restructured": lambda: pictures.restructured_figure(x, stages),
        "logits": lambda: charts.logits_figure(*logits),
        "time": lambda: charts.bars_figure(times, milliseconds, f"time of a batch of {batch}"),
        "memory": lambda: charts.bars_figure(memory, megabytes, f"memory of a batch of {batch}"),
        "half": lambda: charts.half_figure(x, halves),
    }
    paths = {name: out / f"{name}.png" for name in figures}
    for name, make in figures.items():
        pictures.save(make(), paths[name])
    return paths


def write(out, data, paths):
    """Write ``report.json`` and ``report.html``; the page's path."""
    (out / "report.json").write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    path = out / "report.html"
    path.write_text(_page(data, paths), encoding="utf-8")
    return path


def summary(data):
    """The report in a few lines of text."""
    photo, model, parity = data["photo"], data["model"], data["parity"]
    weights = f"random weights, seed {model['seed']}" if model["checkpoint"] is None else "weights of the checkpoint"
    same = "same" if parity["top5_before"] == parity["top5_after"] else "another"
    lines = [
        f"photo    {photo['name']}, {photo['width']} x {photo['height']} -> {photo['img_size']} x {photo['img_size']}",
        f"model    {model['name']}, {model['parameters'] / 1e6:.1f} M parameters, {weights}",
        f"machine  {data['environment']['device']}, torch {data['environment']['torch']}, batch {model['batch']}",
        f"logits   {'same' if parity['ok'] else 'DIFFERENT'}: largest difference {parity['max_abs_difference']:.1e}, "
        f"cosine {parity['cosine']:.9f}, {same} top 5",
        f"         error against float64: before {parity['error_before']:.1e}, after {parity['error_after']:.1e}",
        "",
        f"{'':42} {'before':>10} {'after':>10} {'ratio':>7}",
    ]
    for row in data["time"]:
        numbers = [milliseconds(row[form]["median"]) for form in ("before", "after")]
        lines.append(f"{row['what']:42} {numbers[0]:>10} {numbers[1]:>10} {row['ratio']:6.2f}x")
    for row in data["memory"]:
        numbers = [megabytes(row[form]) for form in ("before", "after")]
        lines.append(f"{row['what']:42} {numbers[0]:>10} {numbers[1]:>10} {row['ratio']:6.2f}x")
    lines += ["", *half_words(data["half"]), *data["notes"]]
    if model["checkpoint"] is None:
        lines.append(RANDOM.format(seed=model["seed"]))
    return "\n".join(lines)


def half_words(rows):
    """What the half-precision experiment showed, a sentence for each dtype."""
    sentences = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        parts = []
        for form in ("before", "after"):
            bad = {r["gain"]: r for r in rows if (r["dtype"], r["form"]) == (dtype, form) and r["tokens_not_finite"]}
            counts = [f"{r['tokens_not_finite']} of {r['tokens']} at weights x {gain:g}" for gain, r in bad.items()]
            parts.append(f"{form} {'tokens not finite: ' + ', '.join(counts) if counts else 'all tokens finite'}")
        sentences.append(f"autocast {dtype}: {'; '.join(parts)}")
    return sentences


def _cards(data):
    parity = data["parity"]
    cards = [
        page.card(f"{parity['max_abs_difference']:.0e}", "largest difference of a logit, float32", not parity["ok"])
    ]
    for row in data["time"]:
        slower = row["ratio"] < 1
        ratio = 1 / row["ratio"] if slower else row["ratio"]
        cards.append(page.card(f"{ratio:.2f}× {'slower' if slower else 'faster'}", row["what"], slower))
    for row in data["memory"][::2]:  # the T2T module's; the whole model's stand in the table
        more = row["ratio"] < 1
        ratio = 1 / row["ratio"] if more else row["ratio"]
        cards.append(page.card(f"{ratio:.2f}× {'more' if more else 'less'}", f"memory, {row['what']}", more))
    return page.cards(cards)


def _weights(model):
    if model["checkpoint"] is None:
        return f'<p class="note">{escape(RANDOM.format(seed=model["seed"]))}</p>'
    return f"<pre>{escape(model['checkpoint'])}</pre>"


def _verdict(parity):
    if parity["ok"]:
        return ""
    return (
        f'<p class="bad note">The logits differ by {parity["relative_difference"]:.1e} of their norm; '
        f"at most {parity['tolerance']:.0e} is allowed.</p>"
    )


def _page(data, paths):
    photo, model, parity = data["photo"], data["model"], data["parity"]
    credit = f" ({photo['credit']})" if photo["credit"] else ""
    top = [
        (a, f"{x:.6f}", b, f"{y:.6f}")
        for a, x, b, y in zip(
            parity["top5_before"],
            parity["top5_logits_before"],
            parity["top5_after"],
            parity["top5_logits_after"],
            strict=True,
        )
    ]
    times = [
        (
            row["what"],
            *(
                f"{milliseconds(row[f]['median'])} ({milliseconds(row[f]['low'])} to {milliseconds(row[f]['high'])})"
                for f in ("before", "after")
            ),
            f"{row['ratio']:.2f}×",
            row["before"]["rounds"],
        )
        for row in data["time"]
    ]
    memory = [
        (row["what"], megabytes(row["before"]), megabytes(row["after"]), f"{row['ratio']:.2f}×")
        for row in data["memory"]
    ]
    halves = [
        (
            row["dtype"],
            f"× {row['gain']:g}",
            row["form"],
            f"{row['inner_tokens_not_finite']} of {row['inner_tokens']}",
            f"{row['tokens_not_finite']} of {row['tokens']}",
            "not finite" if row["error"] is None else f"{row['error']:.1e}",
        )
        for row in data["half"]
    ]
    parts = [
        f"<h1>The same photograph, the same model, {'the same answer' if parity['ok'] else 'another answer'}</h1>",
        f'<p class="lead">{escape(photo["name"])}{escape(credit)} through {escape(model["name"])} in upstream\'s form '
        f"and after <code>t2t_fast.swap(model)</code>, on {escape(data['environment']['device'])}.</p>",
        _verdict(parity),
        _cards(data),
        _weights(model),
        *(f'<p class="note">{escape(note)}</p>' for note in data["notes"]),
        "<h2>The photograph</h2>",
        "<p>The largest central square of the file, scaled to the model's input.</p>",
        page.figure(paths["photo"], "the photograph, and the square that the model sees"),
        "<h2>What a soft split does</h2>",
        "<p>A soft split cuts the image into overlapping windows. Each becomes a token, so neighbours share pixels and "
        "no edge falls between two patches. White dots are the windows' centres.</p>",
        page.figure(paths["windows"], "overlapping windows drawn on the photograph"),
        "<p>The matrix of tokens: one column a token, one row a value of its window, dark is blue and bright is red. "
        "This matrix holds every pixel up to four times; upstream writes it to memory, the swapped model never does. "
        "Below it are the nine windows from above; triangles mark where their rows stand in the matrix.</p>",
        page.figure(paths["tokens"], "the matrix of tokens, and nine tokens as patches"),
        "<p>Soft composition adds the windows up again; divided by how many cover each pixel, that is the input. "
        "Below, the tokens that leave each stage of the tokens-to-token module, laid out as the image that they are "
        "(colours: their three principal components).</p>",
        page.figure(paths["restructured"], "soft composition, and the tokens of three stages as images"),
        "<h2>The same logits</h2>",
        f"<p>Largest difference {parity['max_abs_difference']:.1e}, cosine similarity {parity['cosine']:.9f}. Against "
        f"the same model in float64, the logits are off by {parity['error_before']:.1e} before and "
        f"{parity['error_after']:.1e} after the swap.</p>",
        page.figure(paths["logits"], "logits before and after, and their difference"),
        page.table(("class, before", "logit", "class, after", "logit"), top),
        "<h2>Time</h2>",
        f"<p>Medians of runs in turns, batch {model['batch']}, float32; the thin lines and the ranges in brackets go "
        "from the 20th to the 80th percentile. A training step is forward, backward and SGD with dropout on. The rest "
        "of the model is the same code in both forms, so the whole model gains less than its front end.</p>",
        page.figure(paths["time"], "bars of time before and after"),
        page.table(("", "before", "after", "ratio", "rounds"), times),
        "<h2>Memory</h2>",
        "<p>Kept for backward: the tensors that autograd saves in a training forward, each storage once, without "
        "parameters and input. Peak of a step: most bytes allocated at a time in a training step.</p>",
        page.figure(paths["memory"], "bars of memory before and after"),
        page.table(("", "before", "after", "ratio"), memory),
        "<h2>Half precision</h2>",
        "<p>The T2T module under autocast, with the weights of k, q and v multiplied by a growing factor, as training "
        "may make them grow. Red: tokens of the second Performer layer with a value that is not finite (fp16). Where "
        "one is NaN, so is the loss.</p>",
        *(f"<p>{escape(sentence[0].upper() + sentence[1:])}.</p>" for sentence in half_words(data["half"])),
        page.figure(paths["half"], "tokens that are not finite in fp16, before and after"),
        page.table(
            ("dtype", "weights", "form", "layer 2, not finite", "result, not finite", "error against float64"), halves
        ),
        "<h2>What was swapped, and where this ran</h2>",
        f"<pre>{escape(model['swap'])}</pre>",
        page.table(("", ""), data["environment"].items()),
        f"<footer>Made by t2t-fast demo on {escape(data['made'])} in {data['seconds']:.0f} s. The numbers are in "
        "report.json. t2t-fast verify compares every operator with float64 on this machine.</footer>",
    ]
    return page.document(f"t2t_fast: {model['name']} before and after", parts)
