"""Files with DRM: refused as that, not as damaged."""

from pathlib import Path

import av
import numpy as np
import pytest

from deltacache.pipeline.decoding import probe as container_of_ours
from deltacache.pipeline.decoding.probe import probe_video
from deltacache.schemas.errors import FailureReason, VideoRefusedError

_ENCRYPTION = {
    "encryption_scheme": "cenc-aes-ctr",
    "encryption_key": "00112233445566778899aabbccddeeff",
    "encryption_kid": "ffeeddccbbaa99887766554433221100",
}


def _write(path: Path, **options: str) -> Path:
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264" if path.suffix == ".mp4" else "wmv2", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for shade in range(0, 200, 20):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), shade, np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _reason(path: Path) -> FailureReason:
    with pytest.raises(VideoRefusedError) as refused:
        probe_video(str(path))
    return refused.value.reason


def test_common_encryption_of_mp4_is_seen_in_its_packets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container_of_ours, "_HEADERS", 0)  # what the file's headers say is not looked at
    probe_video(str(_write(tmp_path / "clear.mp4")))
    assert _reason(_write(tmp_path / "drm.mp4", **_ENCRYPTION)) is FailureReason.ENCRYPTED


def test_fairplay_and_windows_media_say_so_in_their_headers(tmp_path: Path) -> None:
    """Neither can be made here: their marks are put into files that cannot be decoded."""
    content = bytearray(_write(tmp_path / "drm.mp4", **_ENCRYPTION).read_bytes())
    content = content.replace(b"encv", b"drmi").replace(b"frma", b"frmx")
    (tmp_path / "fairplay.mp4").write_bytes(content)
    assert _reason(tmp_path / "fairplay.mp4") is FailureReason.ENCRYPTED
    asf = bytearray(_write(tmp_path / "clear.wmv").read_bytes())
    probe_video(str(tmp_path / "clear.wmv"))
    data = asf.index(bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c"))  # the data object: packets follow
    asf[data + 50 :] = bytes(len(asf) - data - 50)
    (tmp_path / "damaged.wmv").write_bytes(asf)
    assert _reason(tmp_path / "damaged.wmv") is not FailureReason.ENCRYPTED
    asf[data + 50 : data + 66] = bytes.fromhex("fbb3112223bdd211b4b700a0c955fc6e")
    (tmp_path / "drm.wmv").write_bytes(asf)
    assert _reason(tmp_path / "drm.wmv") is FailureReason.ENCRYPTED
