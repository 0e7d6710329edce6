//! A second checkpoint read into the tensors of a first one.

use std::collections::HashMap;
use std::time::Instant;

use fst_format::{Checkpoint, Dtype, Manifest, Planned};

use crate::device::Device;
use crate::error::{Error, Result};
use crate::into::Destination;
use crate::loader::Loader;
use crate::report::LoadReport;
use crate::tensor::{Tensor, Tensors};

/// Which tensors an [update](Loader::update) reads.
#[derive(Debug, Clone, Copy, Default)]
#[non_exhaustive]
pub enum Reread<'m> {
    /// All.
    #[default]
    All,
    /// All but those whose bytes are the same range of the same file as before, untouched since: of
    /// checkpoints that share files by links, as snapshots of the Hugging Face hub do. Tensors that are
    /// sliced are read.
    OtherFiles,
    /// All but those that have one sum in this manifest, which says what the tensors hold, and in that of
    /// [`Loader::verify`], which says what they are to become.
    OtherSums(&'m Manifest),
}

/// How a checkpoint differs from the tensors that it is to update.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Difference {
    /// It lacks the tensor, or the loader does not select it there.
    #[error("it is not among those that are loaded")]
    Missing,
    /// There is no such tensor to be updated.
    #[error("there is none to be updated")]
    New,
    /// Types of the elements, as loaded.
    #[error("it holds {held}, and would become {found}")]
    Dtype {
        /// What it holds.
        held: Dtype,
        /// What would be loaded.
        found: Dtype,
    },
    /// Shapes, as loaded.
    #[error("its shape is {held:?}, and would become {found:?}")]
    Shape {
        /// What it has.
        held: Vec<usize>,
        /// What would be loaded.
        found: Vec<usize>,
    },
    /// The loader loads to another device.
    #[error("it is on {held}, and the load is to {found}")]
    Device {
        /// Where it is.
        held: Device,
        /// Where would be loaded to.
        found: Device,
    },
}

impl Loader {
    /// Reads the selected tensors of a checkpoint into the memory of tensors that were loaded before, as for
    /// new weights of a model that is in use: no other memory is taken than
    /// [`load_into`](Self::load_into) takes. What is loaded must be the same tensors: names, types, shapes
    /// and device. `reread` says which are read.
    ///
    /// Nobody else may hold what is read: no clone, view or export of these tensors. Who cannot do
    /// without has [`update_shared`](Self::update_shared).
    ///
    /// After an error that shows before anything is read, the tensors are as they were. After one that shows
    /// while they are read, [verified](Self::verify) or the like, `tensors` is empty: no set of old and new
    /// ones is left.
    ///
    /// ```no_run
    /// use fst::{Checkpoint, Loader, Reread};
    ///
    /// let loader = Loader::new();
    /// let mut tensors = loader.load(&Checkpoint::open("step-1000")?)?;
    /// loader.update(&mut tensors, &Checkpoint::open("step-2000")?, Reread::All)?;
    /// # Ok::<(), fst::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Before anything is read: [`Error::OtherPlan`], [`Error::NotWritable`], [`Error::NoSums`], and what is wrong
    /// with the request. Then as for [`load_into`](Self::load_into).
    pub fn update(
        &self,
        tensors: &mut Tensors,
        checkpoint: &Checkpoint,
        reread: Reread<'_>,
    ) -> Result<()> {
        let update = Update::new(self, tensors, checkpoint, reread)?;
        for (_, tensor) in update.reread_of(tensors.as_mut_slice()) {
            tensor.check_writable()?;
        }
        // Whatever happens from here on, a panic included, no half-new set is left.
        let mut held = tensors.take();
        let destinations = update.reread_of(&mut held);
        let memory = destinations.filter_map(|(item, tensor)| Some((item, tensor.destination()?)));
        let report = update.run(self, checkpoint, memory.collect())?;
        *tensors = update.tensors(held, report);
        Ok(())
    }

    /// As [`update`](Self::update), whoever else holds the tensors: for servers whose readers wait, or do not
    /// mind. Returns the same tensors, which the next update is of: clones made before do not know that
    /// they changed ([`Tensor::info`]).
    ///
    /// # Errors
    ///
    /// As for [`update`](Self::update). After one that shows while they are read, the tensors hold anything.
    ///
    /// # Safety
    ///
    /// Until this returns, nobody reads or writes the elements of these tensors, through whatever clone,
    /// view, export or slice, nor holds a reference to them. None of them is read as what it was before
    /// that: slices made before are used no more.
    pub unsafe fn update_shared(
        &self,
        tensors: &Tensors,
        checkpoint: &Checkpoint,
        reread: Reread<'_>,
    ) -> Result<Tensors> {
        let update = Update::new(self, tensors, checkpoint, reread)?;
        let mut held: Vec<Tensor> = tensors.iter().cloned().collect();
        let memory = update.reread_of(&mut held).map(|(item, tensor)| {
            // SAFETY: passed on from the caller.
            Ok((item, unsafe { tensor.shared_destination() }?))
        });
        let memory = memory.collect::<Result<Vec<_>>>()?;
        let report = update.run(self, checkpoint, memory)?;
        Ok(update.tensors(held, report))
    }
}

/// What is loaded, each with the tensor that it goes to, and whether it is read.
struct Update {
    began: Instant,
    items: Vec<(Planned, usize, bool)>,
}

impl Update {
    fn new(
        loader: &Loader,
        tensors: &Tensors,
        checkpoint: &Checkpoint,
        reread: Reread<'_>,
    ) -> Result<Self> {
        loader.ranks.refuse("an update")?;
        let began = Instant::now();
        let mut by_name: HashMap<&str, (usize, &Tensor)> =
            tensors.iter().enumerate().map(|(at, tensor)| (tensor.name(), (at, tensor))).collect();
        let mut items = Vec::with_capacity(tensors.len());
        for item in loader.planned(checkpoint)? {
            let differs = |difference| {
                let tensor = item.name().to_owned();
                Err(Error::OtherPlan { tensor, difference })
            };
            let Some((at, held)) = by_name.remove(item.name()) else {
                return differs(Difference::New);
            };
            if held.dtype() != item.dtype() {
                return differs(Difference::Dtype { held: held.dtype(), found: item.dtype() });
            }
            if held.shape() != item.shape() {
                let (held, found) = (held.shape().to_vec(), item.shape().to_vec());
                return differs(Difference::Shape { held, found });
            }
            let found = loader.device_of(&item)?;
            if held.device() != found {
                return differs(Difference::Device { held: held.device(), found });
            }
            let read = loader.reads(&item, held, reread)?;
            items.push((item, at, read));
        }
        match by_name.into_keys().min() {
            Some(name) => {
                Err(Error::OtherPlan { tensor: name.to_owned(), difference: Difference::Missing })
            }
            None => Ok(Self { began, items }),
        }
    }

    /// Those that are read, each with its tensor.
    fn reread_of<'t>(
        &'t self,
        tensors: &'t mut [Tensor],
    ) -> impl Iterator<Item = (&'t Planned, &'t mut Tensor)> {
        let mut of: Vec<Option<&Planned>> = vec![None; tensors.len()];
        for (item, at, _) in self.items.iter().filter(|(_, _, read)| *read) {
            of[*at] = Some(item);
        }
        of.into_iter().zip(tensors).filter_map(|(item, tensor)| Some((item?, tensor)))
    }

    fn run(
        &self,
        loader: &Loader,
        checkpoint: &Checkpoint,
        memory: Vec<(&Planned, Destination<'_>)>,
    ) -> Result<LoadReport> {
        if memory.is_empty() {
            let mut report = loader.begin(checkpoint)?;
            report.push("plan", self.began.elapsed(), 0);
            return Ok(report);
        }
        let memory = memory.into_iter().map(|(item, memory)| (item.name(), memory));
        loader.load_into(checkpoint, memory)
    }

    /// The tensors as they are now.
    fn tensors(self, held: Vec<Tensor>, report: LoadReport) -> Tensors {
        let mut held: Vec<Option<Tensor>> = held.into_iter().map(Some).collect();
        let new = self.items.iter().filter_map(|(item, at, _)| {
            let held = held.get_mut(*at)?.take()?;
            Some(held.updated(item))
        });
        Tensors::new(new.collect(), report)
    }
}

impl Loader {
    /// Whether an item is to be read into a tensor of its kind.
    fn reads(&self, item: &Planned, held: &Tensor, reread: Reread<'_>) -> Result<bool> {
        let name = item.source().name();
        Ok(match reread {
            Reread::All => true,
            Reread::OtherFiles => {
                let whole = item.source_len() == item.source().byte_len() && held.is_whole();
                !(whole && held.info().is_same_range(item.source()))
            }
            Reread::OtherSums(before) => {
                let after = self.manifest.as_ref().ok_or(Error::NoSums)?;
                let sum = |manifest: &Manifest| manifest.get(name).map(|sum| sum.sha256);
                sum(before).is_none() || sum(before) != sum(after)
            }
        })
    }
}
