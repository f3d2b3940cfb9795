//! GCC, which compiles a tree of 24 files of C of some 150 lines again and again. An operation is one file, by `gcc -O1 -c`.

use std::path::Path;
use std::process::Command;

use super::{Load, complete};
use crate::content::Random;

pub(super) struct Compile {
    next: u64,
}

impl Compile {
    pub(super) fn start() -> Result<Self, String> {
        let made = |error| format!("the tree to compile cannot be made: {error}");
        std::fs::create_dir_all(TREE).map_err(made)?;
        let mut random = Random(SEED);
        for number in 0..FILES {
            std::fs::write(source(number), program(&mut random)).map_err(made)?;
        }
        Ok(Self { next: 0 })
    }
}

impl Load for Compile {
    fn operate(&mut self) -> Result<(), String> {
        let source = source(self.next);
        self.next = (self.next + 1) % FILES;
        let object = Path::new(&source).with_extension("o");
        complete(Command::new("gcc").args(["-O1", "-c", &source, "-o"]).arg(object))
    }
}

fn source(number: u64) -> String {
    format!("{TREE}/{number}.c")
}

/// A file of functions that all differ.
fn program(random: &mut Random) -> String {
    let mut text = "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n\n".to_owned();
    for number in 0..FUNCTIONS {
        let [length, factor, shift] = [64, 1 << 30, 31].map(|limit| 1 + random.below(limit));
        text.push_str(&format!(
            "unsigned f{number}(const unsigned *values, unsigned seed)
{{
    unsigned sum = seed, table[{length}];
    for (int i = 0; i < {length}; i++) {{
        table[i] = values[i] * {factor}u ^ sum >> {shift};
        if (table[i] % 3 == 0)
            sum += table[i];
        else
            sum = sum * 31 + (unsigned)i;
    }}
    printf(\"f{number} %u\\n\", sum);
    return sum;
}}

"
        ));
    }
    text
}

const TREE: &str = "/tmp/tree";
const SEED: u64 = 1;
const FILES: u64 = 24;
const FUNCTIONS: u64 = 10;
