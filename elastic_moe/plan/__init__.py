"""Pure decisions: batch, ownership of state, placement of experts, token split. numpy and compiled loops only."""
