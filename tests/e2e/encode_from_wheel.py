"""Run in an environment that holds the wheel and nothing else of the repository: make a small model, save, load, encode, in
this process and by `python -m m3jax`."""

import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import tokenizers
from tokenizers import models, pre_tokenizers, processors

import m3jax


def main() -> None:
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁hello", "▁world", "<mask>"]
    inner = tokenizers.Tokenizer(models.Unigram([(piece, 0.0) for piece in pieces], unk_id=3))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    tokenizer = m3jax.Tokenizer.from_json(inner.to_str())
    config = m3jax.M3Config.tiny(vocab_size=tokenizer.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        m3jax.save(m3jax.M3(config, m3jax.init(config, jax.random.key(0)), tokenizer), Path(folder) / "model")
        m3 = m3jax.load(Path(folder) / "model")
        (Path(folder) / "texts").write_text("hello world\nhello\n")
        for arguments in (["encode", "model", "texts", "out", "--colbert"], ["inspect", "out"]):
            program = [sys.executable, "-I", "-m", "m3jax", *arguments]
            done = subprocess.run(program, cwd=folder, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("out: finished\ntexts    2 in 1 shards\n"), done.stdout
        on_disk = m3jax.open_embeddings(Path(folder) / "out")[:]
    embeddings = m3jax.encode(m3, ["hello world", "hello"], colbert=True)
    assert embeddings.dense_vecs.shape == (2, 64), embeddings
    assert [len(vectors) for vectors in embeddings.colbert_vecs] == [3, 2], embeddings
    assert m3jax.score(embeddings, embeddings).hybrid.shape == (2, 2)
    assert abs(m3jax.score(on_disk, on_disk).hybrid - m3jax.score(embeddings, embeddings).hybrid).max() < 1e-2, on_disk
    print(f"the wheel encodes: {embeddings}")


if __name__ == "__main__":  # pytest imports the file, to look for doctests
    main()
