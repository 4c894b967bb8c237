//! The k shortest ways without loops between two nodes (Yen, Management Science 17(11), 1971), over
//! directed edges of length one.
//!
//! Used by `graph` only. Of two ways of the same length the one with more spare capacity comes
//! first, then the one whose links were added earlier: the same network always gives the same
//! answer.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashSet};

use petgraph::Direction::Incoming;
use petgraph::graph::{DiGraph, EdgeIndex, NodeIndex};
use petgraph::visit::EdgeRef;

/// What the search needs to know of an edge.
pub(crate) trait Passable {
    /// May traffic pass now?
    fn is_up(&self) -> bool;
    /// Unused capacity, bit/s.
    fn spare(&self) -> u64;
}

/// Edges in order, and what they are compared by.
type Found = Vec<EdgeIndex>;
type Rank = (usize, Reverse<u64>, Found);

/// Up to `k` shortest ways without loops from `from` to `to`, best first.
pub(crate) fn shortest<N, E: Passable>(
    graph: &DiGraph<N, E>,
    from: NodeIndex,
    to: NodeIndex,
    k: usize,
) -> Vec<Found> {
    let mut found: Vec<Found> = Vec::new();
    let mut candidates: BTreeSet<Rank> = BTreeSet::new();
    candidates
        .extend(search(graph, from, to, &HashSet::new(), &HashSet::new()).map(|p| rank(graph, p)));
    while found.len() < k {
        let Some((_, _, best)) = candidates.pop_first() else { break };
        found.push(best.clone());
        for way in deviations(graph, from, to, &best, &found) {
            candidates.insert(rank(graph, way));
        }
    }
    found
}

fn rank<N, E: Passable>(graph: &DiGraph<N, E>, way: Found) -> Rank {
    let narrowest = way.iter().map(|edge| graph[*edge].spare()).min().unwrap_or(u64::MAX);
    (way.len(), Reverse(narrowest), way)
}

/// For each prefix of `best`: the shortest way that shares the prefix and then leaves every way
/// found so far.
fn deviations<N, E: Passable>(
    graph: &DiGraph<N, E>,
    from: NodeIndex,
    to: NodeIndex,
    best: &Found,
    found: &[Found],
) -> Vec<Found> {
    let mut ways = Vec::new();
    let mut passed: HashSet<NodeIndex> = HashSet::new();
    let mut at = from;
    for length in 0..best.len() {
        let prefix = &best[..length];
        let taken: HashSet<EdgeIndex> = found
            .iter()
            .filter(|way| way.len() > length && way[..length] == *prefix)
            .map(|way| way[length])
            .collect();
        if let Some(rest) = search(graph, at, to, &passed, &taken) {
            ways.push(prefix.iter().copied().chain(rest).collect());
        }
        passed.insert(at);
        let Some((_, next)) = graph.edge_endpoints(best[length]) else { break };
        at = next;
    }
    ways
}

/// The best-ranked shortest way that avoids some nodes and edges: distances to the end by breadth,
/// then a walk that keeps, node by node, the widest beginning.
fn search<N, E: Passable>(
    graph: &DiGraph<N, E>,
    from: NodeIndex,
    to: NodeIndex,
    avoided: &HashSet<NodeIndex>,
    taken: &HashSet<EdgeIndex>,
) -> Option<Found> {
    let mut layer: Vec<(NodeIndex, u64, Found)> = vec![(from, u64::MAX, Vec::new())];
    let mut seen: HashSet<NodeIndex> = avoided.iter().copied().chain([from]).collect();
    while !layer.is_empty() {
        if let Some((_, _, way)) = layer.iter().find(|(node, _, _)| *node == to) {
            return Some(way.clone());
        }
        layer = next_layer(graph, &layer, &seen, taken);
        seen.extend(layer.iter().map(|(node, _, _)| *node));
    }
    None
}

/// Every node one edge further that was not seen, with the widest (then earliest) way to it.
fn next_layer<N, E: Passable>(
    graph: &DiGraph<N, E>,
    layer: &[(NodeIndex, u64, Found)],
    seen: &HashSet<NodeIndex>,
    taken: &HashSet<EdgeIndex>,
) -> Vec<(NodeIndex, u64, Found)> {
    let mut reached: Vec<NodeIndex> = Vec::new();
    for (node, _, _) in layer {
        reached.extend(graph.neighbors(*node).filter(|next| !seen.contains(next)));
    }
    reached.sort_unstable();
    reached.dedup();
    let widest_into = |node: NodeIndex| {
        let into = graph.edges_directed(node, Incoming);
        let usable = into.filter(|edge| edge.weight().is_up() && !taken.contains(&edge.id()));
        let ways = usable.filter_map(|edge| {
            let (_, width, way) = layer.iter().find(|(from, _, _)| *from == edge.source())?;
            let longer: Found = way.iter().copied().chain([edge.id()]).collect();
            Some((Reverse((*width).min(edge.weight().spare())), longer))
        });
        ways.min().map(|(Reverse(width), way)| (node, width, way))
    };
    reached.into_iter().filter_map(widest_into).collect()
}
