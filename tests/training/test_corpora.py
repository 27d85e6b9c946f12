"""The Brown corpus: from word/tag pairs back to prose."""

import pytest

from training.corpora import untag, write_parts
from training.data import read_corpus
from training.files import DataError


def test_tags_go_and_punctuation_is_rejoined():
    tagged = (
        "\n\n\tThe/at City/nn-tl ,/, ``/`` deserves/vbz praise/nn ''/'' ,/, said/vbd Mr./np "
        "Jones/np Jr./np ./.\n"
        "Why/wrb ?/. ?/.\nHe/pps (/( it/pps 's/bez so/rb )/) left/vbd --/-- twice/rb ;/. ;/.\n\n\n"
        "\t``/`` I/ppss ran/vbd 3/cd 1/2/cd miles/nns ''/'' ./.\n"
    )

    assert untag(tagged) == (
        'The City, "deserves praise," said Mr. Jones Jr. Why? He (it \'s so) left -- twice;\n\n'
        '"I ran 3 1/2 miles."'
    )


def test_parts_share_no_document_and_training_reads_them(tmp_path, tiny_tokenizer):
    texts = [f"Document {number}." for number in range(500)]

    report = write_parts("brown", list(texts), tmp_path)

    parts = [
        read_corpus(report[name]["path"], tiny_tokenizer).documents
        for name in ("train", "heldout", "test")
    ]
    assert [len(part) for part in parts] == [400, 50, 50]
    assert sorted(text for part in parts for text in part) == sorted(texts)


def test_a_corpus_that_is_not_whole_is_refused(tmp_path):
    with pytest.raises(DataError, match="499 documents, expected 500"):
        write_parts("brown", ["text"] * 499, tmp_path)
