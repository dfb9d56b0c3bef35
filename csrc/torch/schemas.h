#pragma once

// The ops of this library, as torch knows them: the one list of them in C++.

namespace freedave {

inline constexpr const char* kSchemas[] = {
    "predict_tokens(Tensor logits, Tensor input_ids, int mask_token_id, Tensor? mask_index=None, str measure=\"prob\", "
    "Tensor? suppress_tokens=None, bool logits_shift=False, Tensor? temperature=None, Tensor? seed=None, "
    "Tensor? positions=None, Tensor? floor=None, Tensor? scored_ids=None, str suppress=\"exclude\") -> (Tensor, "
    "Tensor, Tensor)",
    "partial_predictions(Tensor logits, Tensor input_ids, int mask_token_id, int first_token_id=0, "
    "Tensor? mask_index=None, str measure=\"prob\", Tensor? suppress_tokens=None, bool logits_shift=False, "
    "Tensor? temperature=None, Tensor? seed=None, Tensor? positions=None, Tensor? floor=None) -> Tensor",
    "merge_predictions(Tensor states, Tensor input_ids, str measure=\"prob\", bool drawn=False) "
    "-> (Tensor, Tensor, Tensor)",
    "logit_floor(Tensor logits, int? top_k=None, float? top_p=None, float? min_p=None, Tensor? temperature=None, "
    "Tensor? mask_index=None, Tensor? suppress_tokens=None) -> Tensor",
    "rank_positions(Tensor confidence, Tensor mask_index, str order=\"confidence\", int? block_length=None) -> Tensor",
    "select_transfer(Tensor confidence, Tensor mask_index, int num_transfer=1, Tensor? num_transfer_per_row=None, "
    "float? threshold=None, Tensor? threshold_per_row=None, str rule=\"threshold\", str fallback=\"top\", "
    "str order=\"confidence\", int? block_length=None) -> Tensor",
    "build_drafts(Tensor input_ids, Tensor token_ids, Tensor confidence, int mask_token_id, int draft_steps, "
    "int tokens_per_step=1, Tensor? tokens_per_step_per_row=None, float? threshold=None, "
    "Tensor? threshold_per_row=None, str rule=\"threshold\", str order=\"confidence\", "
    "int? block_length=None) -> (Tensor, Tensor)",
    "verify_drafts(Tensor drafts, Tensor targets, Tensor? num_drafts=None, str match=\"exact\", "
    "int? mask_token_id=None) -> Tensor",
    "draft_step(Tensor drafts, Tensor token_ids, Tensor confidence, Tensor num_drafts, int mask_token_id, "
    "int draft_steps, int tokens_per_step=1, Tensor? tokens_per_step_per_row=None, float? threshold=None, "
    "Tensor? threshold_per_row=None, str rule=\"threshold\", str order=\"confidence\", int? block_length=None, "
    "str drafting=\"recycled\", str match=\"exact\", int? eos_token_id=None, Tensor? eos_token_id_per_row=None, "
    "Tensor? step=None, Tensor? answer_start=None) -> Tensor",
    "pooled_step(Tensor drafts, Tensor token_ids, Tensor confidence, Tensor num_drafts, Tensor(a!) pool, "
    "int pool_states, int pool_length, int mask_token_id, int draft_steps, int tokens_per_step=1, "
    "Tensor? tokens_per_step_per_row=None, float? threshold=None, Tensor? threshold_per_row=None, "
    "str rule=\"threshold\", str order=\"confidence\", int? block_length=None, str drafting=\"pooled\", "
    "int? eos_token_id=None, Tensor? eos_token_id_per_row=None, Tensor? step=None, Tensor? answer_start=None, "
    "Tensor? window_start=None, Tensor? computed_length=None, Tensor? slots=None, Tensor? forget=None) -> Tensor",
    "keep(Tensor window_key, Tensor window_value, Tensor accepted, Tensor start, Tensor count, Tensor(a!) stored_key, "
    "Tensor(b!) stored_value, Tensor? slots=None) -> ()",
};

}  // namespace freedave
