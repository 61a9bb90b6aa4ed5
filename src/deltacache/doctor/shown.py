"""What ``doctor`` found, as plain text to paste into a report."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from deltacache.doctor.facts import Examination, Facts
from deltacache.schemas.texts import bytes_text, counted

if TYPE_CHECKING:
    from deltacache.doctor.measured import Measurement


def examination_text(found: Examination) -> str:
    """Sections of aligned lines, the problems last."""
    facts = found.facts
    sections = [
        (
            "versions",
            [
                (name, str(value) if value is not None else "none")
                for name, value in facts["versions"].items()
            ],
        ),
        ("machine", list(_machine(facts))),
        ("disks", list(_disks(facts["disks"]))),
        ("hub", list(_hub(facts["hub"]))),
        ("Ray", list(_ray(facts["ray"]))),
    ]
    if facts["environment"]:
        sections.append(("environment", list(facts["environment"].items())))
    width = max(len(name) for _, lines in sections for name, _ in lines)
    blocks = [
        "\n".join([title, *(f"  {name.ljust(width)}  {value}" for name, value in lines)])
        for title, lines in sections
    ]
    problems = [f"- {each.what}\n  -> {each.way_out}" for each in found.problems]
    blocks.append("\n".join(["problems", *problems]) if problems else "no problems found")
    return "\n\n".join(blocks)


def _machine(facts: Facts) -> Iterator[tuple[str, str]]:
    about = facts["machine"]
    quota = f", the control group allows the time of {about['cores_quota']:g}" if about["cores_quota"] else ""
    load = f", load {about['load']:.1f}" if about["load"] is not None else ""
    yield "system", about["system"]
    fast = [
        name
        for name in about["instructions"]
        if name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "amx_tile")
    ]
    yield "CPU", about["cpu"] + (f" ({', '.join(fast)})" if fast else "")
    yield (
        "cores",
        f"{about['cores_allowed']} of {about['cores']} may be used{quota}; torch uses {about['torch_threads']}{load}",
    )
    yield (
        "memory",
        f"{bytes_text(about['memory_free_bytes'])} of {bytes_text(about['memory_bytes'])} free for this process",
    )
    for device in facts["devices"]:
        rates = device["flop_per_s"]
        factor = rates["bfloat16"] / rates["float32"]
        speed = f"float32 {_rate(rates['float32'])}, bfloat16 {_rate(rates['bfloat16'])}: {factor:.1f} times"
        memory = (
            f", {bytes_text(device['memory_free_bytes'])} of {bytes_text(device['memory_bytes'])} free"
            if "memory_free_bytes" in device
            else ""
        )
        of = " of one core" if device["name"] == "cpu" else ""
        model = (
            f"{device['model']} (capability {device['capability']}){memory}; " if "model" in device else ""
        )
        yield (
            device["name"],
            f"{model}products{of} in {speed}"
            + ("" if device["bfloat16_is_fast"] else ", no gain from --precision bfloat16"),
        )
    if len(facts["devices"]) == 1:
        yield "GPU", "none that torch can use: everything runs on the CPU"


def _disks(facts: Sequence[Facts]) -> Iterator[tuple[str, str]]:
    for each in facts:
        if "bytes" in each:
            kind = f" ({each['kind']})" if each["kind"] else ""
            free = f"{bytes_text(each['free_bytes'])} of {bytes_text(each['bytes'])} free"
            yield each["use"], f"{each['path']}{kind}: {free}"
        else:
            yield each["use"], f"{each['path']}: {each['kind']}"


def _hub(facts: Facts) -> Iterator[tuple[str, str]]:
    if "endpoint" in facts:
        yield "endpoint", facts["endpoint"]
    if facts.get("offline"):
        yield "reachable", "not tried: offline mode"
    elif facts.get("reachable"):
        yield "reachable", f"yes, in {facts['seconds']:.1f} s"
    else:
        yield "reachable", f"no ({facts.get('error')})"
    if "token" in facts:
        yield "token", "set" if facts["token"] else "none"
    cached = "in the local cache" if facts.get("cached") else "not in the local cache"
    access = {"granted": ", access granted", "gated": ", gated and not accessible"}.get(
        facts.get("access", ""), ""
    )
    yield "backbone", f"{facts['backbone']}: {cached}{access}"


def _ray(facts: Facts) -> Iterator[tuple[str, str]]:
    yield "without --ray-address", facts["without_address"]
    if "cluster_here" in facts:
        yield (
            "cluster on this machine",
            f"{facts['cluster_here']}: --ray-address {facts['cluster_here']} uses it",
        )
    if "RAY_ADDRESS" in facts:
        yield "RAY_ADDRESS", f"{facts['RAY_ADDRESS']}, read with --ray-address auto"


def measurement_text(found: "Measurement") -> str:
    """Rates, then a table of hours for each chain."""
    lines = [
        ("products", ", ".join(f"{name} {_rate(rate)}" for name, rate in found.product_flop_per_s.items()))
    ]
    for precision, reached in found.model_flop_per_s.items():
        rate = found.product_flop_per_s[precision]
        lines += [
            (
                f"{name}, {precision}",
                _rate(each) + (f", {each / rate:.0%} of the product rate" if each <= rate else ""),
            )
            for name, each in reached.items()
        ]
    for size, rate in found.decode_clips_per_s.items():
        lines.append((f"decoding at {size} px", f"{rate:.1f} clips/s of one core (10 s of H.264, 340 x 256)"))
    if found.disk:
        disk = found.disk
        writes, reads = (f"{disk[f'{way}_bytes_per_s'] / 1e9:.2f} GB/s" for way in ("write", "read"))
        lines.append(("disk", f"{disk['path']}: writes {writes}, reads {reads}"))
    width = max(len(name) for name, _ in lines)
    text = [
        f"measured on {found.device} in {found.took_s:.0f} s, models of ViT-B width at 256 px",
        *(f"  {name.ljust(width)}  {value}" for name, value in lines),
    ]
    text += [f"  {note}" for note in found.notes]
    blocks = ["\n".join(text)]
    for name, stages in found.chains.items():
        head = f"chain {name} on this machine alone, {counted(found.videos, 'video', form=',')}, one view of 8 frames"
        names = [*(each.name for each in stages), "all"]
        column = max(len(each) for each in names)
        table = [
            head,
            f"  {'stage'.ljust(column)}" + "".join(f"  {p:>12}" for p in found.precisions) + "  limit",
        ]
        for each in stages:
            hours = "".join(f"  {_hours(each.hours(p)):>12}" for p in found.precisions)
            table.append(f"  {each.name.ljust(column)}{hours}  {each.limit(found.precisions[-1])}")
        table.append(
            f"  {'all'.ljust(column)}"
            + "".join(f"  {_hours(found.total_h(name, p)):>12}" for p in found.precisions)
        )
        blocks.append("\n".join(table))
    return "\n\n".join(blocks)


def _hours(hours: float) -> str:
    if hours > 100_000:
        return f"{hours / 8766:,.0f} years"
    return f"{hours:.2g} h" if hours < 10 else f"{hours:,.0f} h"


def _rate(flop_per_s: float) -> str:
    return f"{flop_per_s / 1e12:.2f} TFLOP/s" if flop_per_s >= 1e11 else f"{flop_per_s / 1e9:.0f} GFLOP/s"
