"""Where videos come from: folders, lists, archives, object stores; a local path for the decoder."""
