//! Where a backend registers when the balancer that it was registered at has gone: at the next one of the cluster.
//! Owns the order. Pure.

/// Most balancers that are remembered.
const NODES_MAX: usize = 32;

/// The ways to a cluster.
#[derive(Clone, Debug)]
pub struct Roads {
    /// The one that is taken now comes first.
    all: Vec<String>,
    /// As it was given.
    own: String,
    is_taken: bool,
}

impl Roads {
    /// To the balancer at this address, and to no other yet.
    pub fn to(balancer: &str) -> Roads {
        Roads { all: vec![balancer.to_owned()], own: balancer.to_owned(), is_taken: false }
    }

    /// The balancer that we are registered at has named the others.
    pub fn learn(&mut self, nodes: &[String]) {
        let now = self.all[0].clone();
        let own = [now, self.own.clone()];
        self.all.clear();
        for node in own.iter().chain(nodes).take(NODES_MAX) {
            if !self.all.contains(node) {
                self.all.push(node.clone());
            }
        }
    }

    /// Where to connect next: each in its turn, beginning with the one that was given.
    pub fn take(&mut self) -> &str {
        if self.is_taken {
            self.all.rotate_left(1);
        }
        self.is_taken = true;
        &self.all[0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_balancer_is_tried_in_its_turn_and_the_one_that_was_given_is_never_forgotten() {
        let mut roads = Roads::to("a:1");
        assert_eq!([roads.take().to_owned(), roads.take().to_owned()], ["a:1", "a:1"]);
        let names = |names: &[&str]| names.iter().map(|it| (*it).to_owned()).collect::<Vec<_>>();
        roads.learn(&names(&["b:1", "c:1", "a:1"]));
        let taken: Vec<String> = (0..4).map(|_| roads.take().to_owned()).collect();
        assert_eq!(taken, ["b:1", "c:1", "a:1", "b:1"]);
        roads.learn(&names(&["d:1"]));
        let taken: Vec<String> = (0..3).map(|_| roads.take().to_owned()).collect();
        assert_eq!(taken, ["a:1", "d:1", "b:1"]);
        roads.learn(&(0..99).map(|node| node.to_string()).collect::<Vec<_>>());
        assert_eq!(roads.all.len(), NODES_MAX);
    }
}
