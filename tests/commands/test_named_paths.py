"""``NAME=PATH``: where the name is missing, the one that is suggested comes from the path."""

import pytest
import typer

from deltacache.cli_options import named_paths


@pytest.mark.parametrize(
    ("flag", "text", "suggested"),
    [
        ("--data", "/path/vspw", "vspw=/path/vspw"),
        ("--data", "/sets/KITTI/", "kitti=/sets/KITTI/"),
        ("--data", "/path/leftovers", "vspw=/path/leftovers"),
        ("--data", "test-clips", "clips=test-clips"),
        ("--data", "s3://bucket/clips", "clips=s3://bucket/clips"),
        ("--data", "clips", "clips=PATH"),
        ("--head", "kitti", "kitti=PATH"),
        ("--data", "cityscapes=", "cityscapes=PATH"),
        ("--data", "=/path/kitti", "kitti=/path/kitti"),
        ("--data", "", "vspw=PATH"),
        ("--head", "heads/cityscapes.bin", "cityscapes=heads/cityscapes.bin"),
        ("--head", "clips.bin", "vspw=clips.bin"),
        ("--predictions", "=contexts", "external=contexts"),
        ("--predictions", "cosmos=", "cosmos=PATH"),
    ],
)
def test_the_suggestion_can_be_given(flag: str, text: str, suggested: str) -> None:
    with pytest.raises(typer.BadParameter) as refused:
        named_paths(flag, [text])
    assert str(refused.value).endswith(f"{flag} {text}: give NAME=PATH, such as {suggested}")


def test_names_with_paths() -> None:
    assert named_paths("--data", ["vspw=/a", "kitti=/b=c"]) == {"vspw": "/a", "kitti": "/b=c"}
