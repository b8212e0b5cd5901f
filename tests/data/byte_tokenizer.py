"""A tokenizer of bytes: 256 tokens and a bos. Spawned processes import it by its file, so it stands alone."""


class ByteTokenizer:
    bos_token_id = 256
    vocab_size = 257

    def encode_ordinary(self, text):
        return list(text.encode("utf-8"))

    def encode_batch_ordinary(self, texts, num_threads=1):
        return [self.encode_ordinary(text) for text in texts]

    def decode_bytes(self, ids):
        return bytes(i for i in ids if i < 256)

    @property
    def token_bytes(self):
        return [bytes([i]) for i in range(256)] + [b"<|bos|>"]

    @property
    def token_byte_lengths(self):
        import torch

        return torch.tensor([1] * 256 + [0])
