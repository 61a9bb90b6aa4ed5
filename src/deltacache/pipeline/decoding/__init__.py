"""From videos to the pixels of clips: which frames, by which decoder, in a disposable process, upright and resized."""
