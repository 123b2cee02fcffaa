"""Questions over documents with LangChain and a FlexBatch server.

    pip install langchain-openai langchain-text-splitters
    flexbatch serve --model smollm2 &
    python docs/serve/documents.py FOLDER "What does the planner do?" "Which tiers are there?"

The texts of FOLDER (.md, .txt, .py) are cut into pieces; for each question those with the rarest of its words go into
the prompt. All questions are asked at one time, and share the server's block.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections import Counter
from pathlib import Path

from langchain_core.documents import Document
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from langchain_openai import ChatOpenAI
from langchain_text_splitters import RecursiveCharacterTextSplitter

PROMPT = ChatPromptTemplate.from_messages(
    [
        ("system", "Answer in one or two sentences, by these pieces of documents alone:\n\n{pieces}"),
        ("human", "{question}"),
    ]
)


def words_of(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w{3,}", text.lower()))


class Pieces:
    """The pieces of documents, by the words that they hold: no embeddings, so that one model is all that runs."""

    def __init__(self, folder: Path, size: int) -> None:
        paths = [path for path in sorted(folder.rglob("*")) if path.suffix in (".md", ".txt", ".py")]
        texts = [Document(path.read_text(errors="replace"), metadata={"source": str(path)}) for path in paths]
        self.pieces = RecursiveCharacterTextSplitter(chunk_size=size, chunk_overlap=size // 8).split_documents(texts)
        self.words = [words_of(piece.page_content) for piece in self.pieces]
        self.holders = Counter(word for words in self.words for word in words)

    def best(self, question: str, count: int = 3) -> str:
        def score(number: int) -> float:
            found = self.words[number].keys() & words_of(question).keys()
            return sum(math.log(len(self.pieces) / self.holders[word]) for word in found)

        chosen = sorted(range(len(self.pieces)), key=score, reverse=True)[:count]
        return "\n\n".join(f"({self.pieces[i].metadata['source']})\n{self.pieces[i].page_content}" for i in chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description="Questions over documents, answered by a FlexBatch server.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--piece-size", type=int, default=800, help="characters")
    args = parser.parse_args()
    pieces = Pieces(args.folder, args.piece_size)
    key = os.environ.get("OPENAI_API_KEY", "none")
    model = ChatOpenAI(model=args.model, base_url=args.url, api_key=key, temperature=0, max_tokens=80)
    read = RunnableLambda(lambda question: {"question": question, "pieces": pieces.best(question)})
    answers = (read | PROMPT | model | StrOutputParser()).batch(args.questions)
    for question, answer in zip(args.questions, answers, strict=True):
        print(f"{question}\n  {answer.strip()}")


if __name__ == "__main__":
    main()
