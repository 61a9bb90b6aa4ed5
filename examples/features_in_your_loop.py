"""Patch tokens of videos in a training loop of one's own: a linear layer that guesses the next frame's tokens.

python examples/features_in_your_loop.py videos/ features/ --backbone tiny --image-size 64 --steps 20
"""

import argparse

import torch
from torch.utils.data import DataLoader, Dataset

import deltacache


class Pairs(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Consecutive frames: patch tokens (N, D) of one and of the next."""

    def __init__(self, features: deltacache.Dataset) -> None:
        self.features = features
        self.per_clip = features.card.sampling.frames - 1

    def __len__(self) -> int:
        return len(self.features) * self.per_clip

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        clip, frame = divmod(index, self.per_clip)
        tokens = self.features.read_frames(clip, frame, frame + 2)  # (2, N, D) float16, a view of the file
        previous, current = torch.from_numpy(tokens.astype("float32"))
        return previous, current


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("videos")
    parser.add_argument("features", help="where the patch tokens are cached; a second run reuses them")
    parser.add_argument("--backbone", default=None)
    parser.add_argument("--image-size", default=256)
    parser.add_argument("--encoders", type=int, default=None, help="0: in this process, for a few videos")
    parser.add_argument("--steps", type=int, default=200)
    asked = parser.parse_args()

    features = deltacache.extract_features(
        asked.videos,
        asked.features,
        backbone=asked.backbone,
        image_size=asked.image_size,
        encoders=asked.encoders,
    )
    print(f"{len(features)} clips of {features.card.patch_grid} patches, {features.card.hidden_size} wide")
    torch.manual_seed(0)
    model = torch.nn.Linear(features.card.hidden_size, features.card.hidden_size)
    torch.nn.init.eye_(model.weight)  # starts as a copy of the last frame
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step = 0
    while step < asked.steps:
        for previous, current in DataLoader(Pairs(features), batch_size=16, shuffle=True):
            loss = (model(previous) - current).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % max(1, asked.steps // 10) == 0:
                print(f"step {step}: loss {loss.item():.4f}")
            step += 1
            if step == asked.steps:
                break


if __name__ == "__main__":
    main()
