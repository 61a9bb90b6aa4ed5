"""Many futures of one clip in one pass: sample delta tokens, decode them, look how far they are from the truth.

python examples/futures_of_a_clip.py features/ tokenizer/ world/ --samples 20
"""

import argparse

import torch

import deltacache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("features", help="output of extract-features")
    parser.add_argument("tokenizer", help="output of train-tokenizer")
    parser.add_argument("world", help="output of train-world on delta tokens")
    parser.add_argument("--clip", type=int, default=0)
    parser.add_argument("--context", type=int, default=4)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()

    features = deltacache.open_dataset(asked.features, "features")
    tokenizer = deltacache.load_tokenizer(asked.tokenizer, device="cpu")
    world = deltacache.load_world(asked.world, device="cpu")
    clip, grid = features.read(asked.clip), features.card.patch_grid
    tokens = torch.from_numpy(clip.patch_tokens.astype("float32"))[None]  # (1, T, N, D)
    seconds = torch.from_numpy(clip.timestamps_s)[None]  # (1, T)
    black = torch.from_numpy(
        features.black_patch_tokens.astype("float32")
    )  # (N, D), the frame before the first

    deltas = tokenizer.encode_clip(tokens, black, grid)  # (1, T, D)
    seen, steps = asked.context, tokens.shape[1] - asked.context
    generator = torch.Generator().manual_seed(asked.seed)
    noise = world.draw_noise((1, asked.samples, steps, world.noise_width()), generator)
    sampled = world.rollout(deltas[:, :seen], seconds, noise)  # (1, S, H, D)
    futures = deltacache.decode_future(tokenizer, tokens[:, seen - 1], sampled, grid)  # (1, S, H, N, D)

    truth = tokens[:, None, seen:]
    errors = (futures - truth).square().mean((0, 3, 4))  # (S, H)
    copied = (tokens[:, seen - 1 : seen] - tokens[:, seen:]).square().mean((0, 2, 3))  # (H,)
    print(
        f"{asked.samples} futures of {clip.clip_id}, {steps} steps after {seen} frames (mean squared errors)"
    )
    print("step  best of all  mean of all  copy of the last frame")
    for step in range(steps):
        best, mean = errors[:, step].min(), errors[:, step].mean()
        print(f"{step + 1:>4}  {best:11.5f}  {mean:11.5f}  {copied[step]:22.5f}")


if __name__ == "__main__":
    main()
