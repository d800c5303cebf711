"""What the words of mining and captions mean that a run's report uses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

REASONS = {
    "cut off": "the answer had not ended after captioning.max_new_tokens tokens",
    "unparseable": "no text in the form that the prompt asks for, or markup in it",
    "set phrase": "talk such as “Sure! Here is”, not a text",
    "declined": "the captioner answered “none”: no text fits both images",
    "same as the original text": "the new text says what the human one says",
    "too short": "fewer words than captioning.min_words",
    "too long": "more words than captioning.max_words",
    "not verified": "the captioner's own probability that the text is right is below"
    " captioning.min_verify_probability",
    "round trip": "the embedder ranks the mined image for the new text below"
    " captioning.max_round_trip_rank",
    "ranked high enough already": "the embedder ranks the mined image for the new text above"
    " captioning.min_round_trip_rank: nothing to learn",
    "a surer text was kept": "another text for the same mined image has a higher probability",
    "duplicate": "a triplet with this reference and text is there already",
    "enough for this query": "captioning.max_per_query or max_per_query_in_all is reached",
    "enough for this iteration": "captioning.max_per_iteration is reached",
}
"""Why a text was rejected."""
LEFT_OUT = {
    "positives of the line": "named as right beside the target in the training data",
    "copies of the target": "the same image as the target under another name",
    "copies of the reference": "the same image as the reference under another name",
    "same text": "the target of another query with the same reference and text",
    "confirmed by the captioner": "the captioner wrote the query's text for it",
    "right by the catalogue": "right by what the catalogue knows of images",
    "other spellings of target or reference": "its name differs from theirs in spelling alone",
}
"""Why an image is no negative of a query."""
FILTERS = {
    "score_margin": "drops images that score above the target's score less a margin",
    "near_duplicate": "drops images whose vector is nearly the target's",
    "verify": "drops images that the foundation model calls right",
    "agreement": "drops images that a second embedder also ranks above the target",
}
"""What the filters after mining drop."""
COLUMNS = {
    "target first": "queries whose target the model ranks first: nothing is mined for most of them",
    "queries mined": "queries that got at least one negative",
    "left out as right": "images that are known to be right, and so are no negatives",
    "false negative": "a mined image that is right after all, where the data set knows",
}
"""Columns of the table of mined negatives."""
Legend = Sequence[tuple[str, str]]


def legend(meanings: dict[str, str], words: Iterable[str]) -> Legend:
    """Return the meanings of the words that are there, in the order of the meanings."""
    used = {*words}
    return [(word, meaning) for word, meaning in meanings.items() if word in used]
