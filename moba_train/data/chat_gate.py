"""May these sources hold conversations? Asked at the first that is read."""

from __future__ import annotations

from collections.abc import Iterator

from moba_train.data.chat import ChatEncoder, ChatTemplate
from moba_train.data.records import Conversation, Document
from moba_train.data.tokenizer import Tokenizer
from moba_train.data.tokenizer_hf import HfTokenizer
from moba_train.errors import ConfigError, DataError, UserError


class ChatGate:
    """Lets documents pass, and conversations only if they can become ids.

    Args:
        template: what was found to render them; None = nothing.
        tokenizer: the one that was taken; None = one is to be trained.
        named: what `--tokenizer` says.
        join: all text becomes one document.
    """

    def __init__(self, template: ChatTemplate | None, tokenizer: Tokenizer | None, named: str, *, join: bool) -> None:
        self.template = template
        self._tokenizer = tokenizer
        self._named = named
        self._join = join

    def passed(self, documents: Iterator[Document]) -> Iterator[Document]:
        """The same documents.

        Raises:
            ConfigError: conversations and --join.
            DataError: conversations without a tokenizer.json or without a chat template, or that is none.
        """
        is_checked = False
        for document in documents:
            if isinstance(document, Conversation) and not is_checked:
                self._check(document.where)
                is_checked = True
            yield document

    def _check(self, where: str) -> None:
        if not isinstance(self._tokenizer, HfTokenizer):
            raise DataError(
                "conversations need the tokenizer.json of a chat model",
                where=where,
                got=f"--tokenizer {self._named}",
                allowed="a tokenizer.json whose special tokens the chat template writes",
                fix="name it: --tokenizer PATH/tokenizer.json",
            )
        if self._join:
            raise ConfigError(
                "conversations cannot be joined to one document", where=where, got="--join", fix="Leave --join out."
            )
        if self.template is None:
            raise self._no_template(where, self._tokenizer)
        ChatEncoder(self.template, self._tokenizer)  # a template that does not compile is told before work is done

    def _no_template(self, where: str, tokenizer: HfTokenizer) -> UserError:
        return DataError(
            "there is no chat template for conversations",
            where=where,
            got=f"no chat_template.jinja, and no chat_template in tokenizer_config.json, beside {tokenizer.path}",
            fix="Copy the model's template there, or name one: --chat-template FILE.",
        )
