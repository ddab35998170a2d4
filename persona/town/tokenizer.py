"""The town's tokenizer: one id per word or punctuation mark, and a chat template that marks the assistant's words.

Text of the town is lower case with a space around every token. The tokenizer also takes ordinary writing ("Hello,
you!") and gives the ids of the canonical form; decoding always gives the canonical form.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, normalizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from persona.errors import UserError
from persona.types import Message

PAD, BOS, END, UNK = "<|pad|>", "<|bos|>", "<|end|>", "<|unk|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIAL_TOKENS = (PAD, BOS, END, UNK, *ROLES.values())

# A token is a word, with inner apostrophes and hyphens, or a single mark; everything between tokens is dropped.
TOKEN_PATTERN = r"\w+(?:['-]\w+)*|[^\w\s]"

# Shapes are padded to this multiple, and at least this many ids stay free for words the language may still learn.
VOCABULARY_MULTIPLE = 64
SPARE_IDS = 32

# `generation` marks the spans that count as the assistant's own (content and its end token), as TRL reads them.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role not in ['system', 'user', 'assistant'] -%}
{{- raise_exception("role '" + message.role + "' is unknown to the town: use system, user or assistant") -}}
{%- endif -%}
{{- '<|' + message.role + '|>' -}}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{- message.content + eos_token -}}{%- endgeneration -%}
{%- else -%}
{{- message.content + eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def build_tokenizer(words: Sequence[str], previous: PreTrainedTokenizerFast | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer over `words`; ids: special tokens, words in the given order, then reserved ids.

    With `previous`, every word it knows keeps its id and new words take its reserved ids, so that weights trained
    with it still fit. Raises UserError for a word the splitting rule would not leave whole, and when the reserved
    ids of `previous` do not suffice.
    """
    split = Split(Regex(TOKEN_PATTERN), behavior="removed", invert=True)
    for word in words:
        pieces = [piece for piece, _ in split.pre_tokenize_str(word)]
        if pieces != [word] or word != word.lower():
            raise UserError(
                f"the town's word {word!r} would be split into {pieces}: one lower-case word or one mark each"
            )
    if previous is None:
        entries = [*SPECIAL_TOKENS, *dict.fromkeys(words)]
        size = -(-(len(entries) + SPARE_IDS) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        entries += [f"<|reserved_{index}|>" for index in range(size - len(entries))]
        ids = {token: index for index, token in enumerate(entries)}
    else:
        known = previous.get_vocab()
        ids = dict(known)
        spare = sorted((index, token) for token, index in known.items() if token.startswith("<|reserved_"))
        new = [word for word in dict.fromkeys(words) if word not in known]
        if len(new) > len(spare):
            raise UserError(f"{len(new)} new words of the town do not fit the {len(spare)} reserved ids: train afresh")
        for word, (index, token) in zip(new, spare, strict=False):
            del ids[token]
            ids[word] = index

    model = Tokenizer(WordLevel(dict(sorted(ids.items(), key=lambda pair: pair[1])), unk_token=UNK))
    model.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    model.pre_tokenizer = split
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        unk_token=UNK,
        extra_special_tokens=list(ROLES.values()),
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Ids of a conversation and, for each, whether it is the assistant's own (content and end token).

    The same ids and mask as the chat template gives, without its rendering, which is too slow for a training stream.
    Raises UserError for a word outside the vocabulary, which in training text is a fault of the grammar.
    """
    contents = tokenizer.backend_tokenizer.encode_batch([m.content for m in messages], add_special_tokens=False)
    ids, own = [tokenizer.bos_token_id], [False]
    for message, content in zip(messages, contents, strict=True):
        if tokenizer.unk_token_id in content.ids:
            word = message.content[slice(*content.offsets[content.ids.index(tokenizer.unk_token_id)])]
            raise UserError(f"the word {word!r} of {message.content!r} is not in the town's vocabulary")
        assistant = message.role == "assistant"
        ids += [tokenizer.convert_tokens_to_ids(ROLES[message.role]), *content.ids, tokenizer.eos_token_id]
        own += [False, *[assistant] * (len(content.ids) + 1)]
    return ids, own
