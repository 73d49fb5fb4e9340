// The simulator's mind: a helper process that runs a real language decoder.
#pragma once

#include <string>
#include <vector>

#include "session.h"

namespace npusim {

// Hands a prompt and the rows of its pictures to the helper at the socket NPUSIM_MIND, and returns
// the tokens of its answer, at most `most`. The texts are those around the pictures.
std::vector<Token> think(const std::vector<std::string> &texts, const Block &pictures, int columns,
                         int most);

}  // namespace npusim
