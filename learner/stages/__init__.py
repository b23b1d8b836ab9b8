"""The stages a learner can run, by name: each is a function of the Learner and plain values."""

from learner.stages.begin import begin
from learner.stages.offline import offline_pretrain, offline_rl
from learner.stages.real_rl import real_rl
from learner.stages.self_imitation import self_imitation
from learner.stages.supervised import pretrain, sft
from learner.stages.twin_chunk_q import twin_chunk_q
from learner.stages.twin_rl import twin_rl

STAGES = {
    "begin": begin,
    "pretrain": pretrain,
    "sft": sft,
    "twin_rl": twin_rl,
    "self_imitation": self_imitation,
    "twin_chunk_q": twin_chunk_q,
    "real_rl": real_rl,
    "offline_pretrain": offline_pretrain,
    "offline_rl": offline_rl,
}
